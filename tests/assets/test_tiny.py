"""The shipped model, loaded with the tools of its users."""

import json

import grpo_actors.policy  # noqa: F401  # loads the fast BLAS before mlx

import mlx.core as mx  # isort: skip
import pytest
from mlx_lm import batch_generate, load

from grpo_actors.assets import TINY, make_tiny
from grpo_actors.assets.teacher import CAREFUL, CARELESS, Teacher
from grpo_actors.assets.tokenizer import SPECIAL_TOKENS, TAGS
from grpo_actors.tasks.arithmetic import Arithmetic


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load(str(TINY))
    model.set_dtype(mx.float32)
    return model, tokenizer


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


@pytest.fixture(scope="module")
def problems():
    return Arithmetic(seed=0).problems("eval")[:120]


def lessons(count, care):
    teacher = Teacher(seed=1)
    return [teacher.lesson(care) for _ in range(count)]


def chat(tokenizer, problem):
    return tokenizer.apply_chat_template(problem.messages, add_generation_prompt=True)


def test_the_whole_folder_is_smaller_than_two_megabytes():
    assert sum(file.stat().st_size for file in TINY.iterdir()) < 2_000_000


def test_the_weights_are_the_697_472_that_the_config_implies():
    # embedding 320·128; a layer: 4 attention matrices 128·128, 3 feed-forward 128·256, 2 norms of 128; a last norm
    expected = 320 * 128 + 4 * (4 * 128 * 128 + 3 * 128 * 256 + 2 * 128) + 128
    assert expected == 697_472
    weights = mx.load(str(TINY / "model.safetensors"))
    assert sum(weight.size for weight in weights.values()) == expected
    assert {weight.dtype for weight in weights.values()} == {mx.bfloat16}


def test_config_and_tokenizer_name_the_same_end_and_padding(tokenizer):
    config = json.loads((TINY / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert config["pad_token_id"] == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<|pad|>")
    assert config["vocab_size"] == len(tokenizer.get_vocab()) == 320
    assert tokenizer.eos_token_ids == {tokenizer.eos_token_id}


def test_each_digit_is_one_token_wherever_it_stands(tokenizer):
    for text in ("4821", "7*3=21. 21+41=62.", "a9b", " 10 "):
        digits = [
            token for token in map(tokenizer.decode, tokenizer.encode(text)) if any(map(str.isdigit, token))
        ]
        assert digits == [character for character in text if character.isdigit()]


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_is_one_token_that_decoding_keeps(tokenizer, tag):
    (token,) = tokenizer.encode(tag)
    assert tokenizer.decode([token], skip_special_tokens=True) == tag
    assert len(tokenizer.encode(f"12{tag}7")) == 4


def test_special_tokens_are_single_and_skipped_in_text(tokenizer):
    for token in SPECIAL_TOKENS:
        (number,) = tokenizer.encode(token)
        assert tokenizer.decode([number], skip_special_tokens=True) == ""


def test_every_text_survives_the_round_trip(tokenizer, problems):
    texts = [problem.messages[-1]["content"] for problem in problems]
    texts += [lesson.completion for lesson in lessons(50, CARELESS)]
    texts += [chr(code) for code in range(1, 256)] + ["naïve  数学 🦔\n\t .?", " a  b "]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_chat_template_marks_every_turn(tokenizer):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "1+1?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|system|>S<|end|><|user|>1+1?<|end|><|assistant|>"


def test_prompts_have_at_most_32_tokens(tokenizer):
    lengths = [len(chat(tokenizer, problem)) for problem in Arithmetic(seed=0).problems("eval")]
    assert 12 <= min(lengths) <= max(lengths) <= 32


def test_right_solutions_fit_40_new_tokens_with_room(tokenizer):
    assert max(len(tokenizer.encode(lesson.completion)) + 1 for lesson in lessons(300, CAREFUL)) <= 32


def test_a_careful_teacher_is_always_right():
    task = Arithmetic(seed=1)
    problems = {problem.messages[-1]["content"]: problem for problem in task.problems("train")}
    for lesson in lessons(300, CAREFUL):
        assert task.is_correct(lesson.completion, problems[lesson.question])


def test_no_lesson_is_about_a_held_out_problem():
    held_out = {problem.messages[-1]["content"] for problem in Arithmetic(seed=0).problems("eval")}
    assert held_out.isdisjoint(lesson.question for lesson in lessons(3000, CARELESS))


@pytest.mark.slow  # its kernels take half a minute to compile on a CPU
def test_two_steps_of_the_recipe_write_a_folder_that_loads(tmp_path, capsys):
    make_tiny.main(["--output", str(tmp_path), "--steps", "2", "--eval-problems", "6"])
    printed = capsys.readouterr().out
    assert "697,472 parameters" in printed
    assert "step    2/2" in printed
    assert "of 6 held-out problems" in printed
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in TINY.iterdir()}
    # The tokenizer is made before the training, so even two steps must give the one that ships.
    made, shipped = (json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path, TINY))
    assert made["model"]["vocab"] == shipped["model"]["vocab"]


def test_bare_equations_are_true():
    for equation in Teacher(seed=1).equations(300).split(". ")[:-1]:
        left, right = equation.split("=")
        for operator, result in (("+", int.__add__), ("-", int.__sub__), ("*", int.__mul__)):
            if operator in left:
                assert result(*map(int, left.split(operator))) == int(right)


def test_the_shipped_model_starts_careless_but_able(loaded, problems):
    model, tokenizer = loaded
    completions = batch_generate(
        model,
        tokenizer,
        [chat(tokenizer, problem) for problem in problems],
        max_tokens=40,
        completion_batch_size=64,
        prefill_batch_size=64,
    ).texts
    task = Arithmetic(seed=0)
    right = [task.is_correct(text, problem) for text, problem in zip(completions, problems, strict=True)]
    # Greedy, 51 % of 600 were right when it was made; 0.36 and 0.66 are 3.3 standard deviations of 120 away.
    assert 0.36 < sum(right) / len(right) < 0.66
