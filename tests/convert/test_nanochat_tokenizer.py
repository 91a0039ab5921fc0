import grpo_actors.policy  # noqa: F401  the fast BLAS comes before MLX

# isort: split

import pickle
import random

import mlx_lm
import pytest
import tiktoken
from nanochat_files import PATTERN, SPECIAL, VOCAB, Tiny, encoding, write
from test_convert import refusal

from grpo_actors.config import ModelConfig
from grpo_actors.convert import __main__ as convert
from grpo_actors.errors import ModelError
from grpo_actors.policy.model import load_policy

TEXTS = [
    "What is 12 + 1234? I'LL say the answer: 1,246.50",
    "def f(x):\n    return x**2  # the square\n\n\tprint('ok')\r\n",
    "  leading and   many   spaces \n\n\n end  ",
    "abc aabc aaaaa abcbc xthex theING あいう é e\u0301",
    "naïve café — “quotes” 你好世界 🙂🚀 ٣٤٥ ½",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("nanochat")
    source = write(at / "source", Tiny())
    arguments = ["--nanochat", str(source), "--output-dir", str(at / "model"), "--sample-tokens", "0"]
    assert convert.main(arguments) == 0
    return at / "model"


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(ModelConfig(model_name=str(folder)), seed=0)


def special(text: str) -> int:
    return VOCAB - len(SPECIAL) + SPECIAL.index(text)


def random_texts(count: int) -> list[str]:
    rng = random.Random(1)
    letters = [*"abcehinrtw  \n\t12390'.,(\"", "é", "あ", "あ", "🙂", "\u3000", "\r\n", "the", " what"]
    return ["".join(rng.choices(letters, k=rng.randint(1, 60))) for _ in range(count)]


def test_mlx_lm_and_the_policy_give_tiktokens_ids_and_texts(folder, policy):
    reference = encoding()
    _, tokenizer = mlx_lm.load(str(folder))
    for text in [*TEXTS, *random_texts(500)]:
        ids = reference.encode_ordinary(text)
        assert tokenizer.encode(text) == ids
        assert policy.tokenizer.encode(text) == ids
        assert policy.decode(ids) == text


def test_the_texts_detect_a_wrong_split_and_a_lost_merge():
    def ids(pattern: str) -> list[list[int]]:
        other = encoding(pattern)
        return [other.encode_ordinary(text) for text in TEXTS]

    assert ids(PATTERN) != ids(PATTERN.replace("{1,2}", "{1,3}"))
    assert len(encoding().encode_ordinary("abc")) == 1  # two merges deep
    assert encoding().encode_ordinary("12345")[0] == encoding().encode_single_token("12")


def test_a_stream_of_tokens_decodes_to_the_text(folder):
    _, tokenizer = mlx_lm.load(str(folder))
    detokenizer = tokenizer.detokenizer
    for token in encoding().encode_ordinary(TEXTS[3]):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == TEXTS[3]


def test_an_answer_ends_with_its_end_or_with_another_document(policy):
    assert policy.stop_tokens == {special("<|assistant_end|>"), special("<|bos|>")}
    assert policy.decode([104, 105, special("<|assistant_end|>")]) == "hi"


def test_a_conversation_has_nanochats_ids(policy):
    text = encoding().encode_ordinary
    turns = [
        {"role": "user", "content": " What is 12? \n"},
        {"role": "assistant", "content": "the abc"},
        {"role": "user", "content": "Why?"},
    ]
    # As nanochat renders it: each turn between its own two tokens, nothing stripped and nothing added.
    assert policy.chat.encode(turns) == [
        *(special("<|bos|>"), special("<|user_start|>"), *text(" What is 12? \n"), special("<|user_end|>")),
        *(special("<|assistant_start|>"), *text("the abc"), special("<|assistant_end|>")),
        *(special("<|user_start|>"), *text("Why?"), special("<|user_end|>"), special("<|assistant_start|>")),
    ]


def test_a_system_turn_is_put_before_the_text_of_the_first_user_turn(policy):
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
    merged = {"role": "user", "content": "Be brief.\n\nWhy?"}
    answer = {"role": "assistant", "content": "So."}
    assert policy.chat.encode([system, user]) == policy.chat.encode([merged])
    assert policy.chat.encode([system, user, answer, user]) == policy.chat.encode([merged, answer, user])


def test_python_calls_have_their_own_tokens(policy):
    parts = [
        {"type": "text", "text": "So: "},
        {"type": "python", "text": "6*2"},
        {"type": "python_output", "text": "12"},
    ]
    turns = [{"role": "user", "content": "6*2?"}, {"role": "assistant", "content": parts}]
    rendered = policy.tokenizer.apply_chat_template(turns, tokenize=False)
    assert rendered == (
        "<|bos|><|user_start|>6*2?<|user_end|><|assistant_start|>So: <|python_start|>6*2<|python_end|>"
        "<|output_start|>12<|output_end|><|assistant_end|>"
    )


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        (["system"], "must come before a user turn"),
        (["assistant"], "must alternate"),
        (["user", "user"], "must alternate"),
        (["system", "assistant"], "must alternate"),
    ],
)
def test_turns_that_nanochat_refuses_are_refused(policy, roles, words):
    with pytest.raises(ModelError, match=words):
        policy.chat.encode([{"role": role, "content": "x"} for role in roles])


# --- tokenizer.pkl is untrusted ---------------------------------------------------------------------------


class Runs:
    """An object that writes a file if pickle itself loads it."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def refused(tmp_path, capsys, tokenizer: bytes) -> str:
    source = write(tmp_path / "source", Tiny(tokenizer=tokenizer))
    line = refusal(capsys, "--nanochat", source, "--output-dir", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert "tokenizer.pkl: " in line
    return line


def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path, capsys):
    line = refused(tmp_path, capsys, pickle.dumps(Runs(tmp_path / "ran")))
    assert "must hold a tiktoken.Encoding and nothing else, its pickle asks for 'io.open'" in line


def test_code_hidden_in_an_encoding_is_refused_too(tmp_path, capsys):
    hidden = encoding()
    hidden.name = Runs(tmp_path / "ran")
    assert "nothing of it was run" in refused(tmp_path, capsys, pickle.dumps(hidden))


def of_state(**changes: object) -> bytes:
    """Return the pickle of an encoding with a changed state, as tiktoken would write it."""
    changed = encoding()
    for key, value in changes.items():
        setattr(changed, key, value)
    return pickle.dumps(changed)


def ranks(**changes: int) -> dict[bytes, int]:
    return encoding()._mergeable_ranks | {text.encode(): rank for text, rank in changes.items()}


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (b"", "cannot be read"),
        (b"not a pickle", "cannot be read"),
        (pickle.dumps(encoding())[:-100], "cannot be read"),
        (pickle.dumps({"name": "gpt2"}), "must hold a tiktoken.Encoding, got dict"),
        (pickle.dumps(tiktoken.Encoding), "got type"),
        (of_state(_mergeable_ranks=[b"a"]), "its state is another"),
        (of_state(_special_tokens={"<|bos|>": 300.0}), "its state is another"),
        (of_state(_mergeable_ranks={b"a": 0}), "every single byte must be a token, 0x00 is none"),
        (of_state(_mergeable_ranks=ranks(a=98)), "each once"),
        (of_state(_special_tokens={}), "is another model's"),
        (pickle.dumps(encoding(special=(*SPECIAL[:4], "<|end|>", *SPECIAL[5:]))), "<|assistant_end|> is missing"),
        (of_state(_pat_str="("), "its split pattern is"),
    ],
)  # fmt: skip
def test_an_incomplete_or_invalid_encoding_is_refused_in_one_line(tmp_path, capsys, tokenizer, words):
    assert words in refused(tmp_path, capsys, tokenizer)


def test_an_encoding_pickled_only_by_its_name_is_refused(tmp_path, capsys, monkeypatch):
    registered = encoding()
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "tiny", registered)
    line = refused(tmp_path, capsys, pickle.dumps(registered))
    assert "names tiktoken's encoding 'tiny' and does not hold it" in line


def test_a_pattern_that_tokenizers_reads_differently_is_refused(tmp_path, capsys):
    # {1,2}+ is possessive for tiktoken; tokenizers' engine repeats "one or two" any number of times.
    tokenizer = pickle.dumps(encoding(PATTERN.replace("{1,2}", "{1,2}+")))
    assert "its encoding has no equal tokenizer.json: tiktoken splits" in refused(tmp_path, capsys, tokenizer)
