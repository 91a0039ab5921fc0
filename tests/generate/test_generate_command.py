"""``python -m grpo_actors.generate`` as a user starts it, and its errors."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from bounds import HANG_S
from commands import run_here
from thinking_model import write_thinking_model

from grpo_actors.config import Config
from grpo_actors.errors import ConfigError, DataError, ModelError
from grpo_actors.generate.__main__ import chat_main, main
from grpo_actors.generate.command_line import chat_parser, check, parser
from grpo_actors.generate.opening import params_of
from grpo_actors.generate.output import job_file
from grpo_actors.policy.decoding.sampling import SamplingParams
from grpo_actors.process import MEMORY_LIMIT
from grpo_actors.rundir.folder import CONFIG_FILE, DATA_FILE, MANIFEST
from grpo_actors.rundir.prompting import Prompting, prompting_of

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
ENVIRONMENT.pop("PYTHONUNBUFFERED", None)
#: At this temperature the embedded model says anything, and seldom ends before it is cut.
BABBLE = ["--temperature", "50"]


def command(*arguments):
    return [sys.executable, "-m", "grpo_actors.generate", *map(str, arguments)]


def run(*arguments, **more):
    return subprocess.run(
        command(*arguments),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
        **({"stdin": subprocess.DEVNULL} | more),
    )


def lines(path):
    """Read the complete lines."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


# --- one prompt -----------------------------------------------------------------------------------


def test_a_prompt_on_standard_input_and_json_give_the_same_answer_as_the_command_line():
    piped = run("--seed", 3, "--max-tokens", 60, stdin=None, input="What is 12 + 34?\n")
    told = run_here(main, "What is 12 + 34?", "--seed", 3, "--max-tokens", 60, "--json", "--samples", 2)
    assert (piped.returncode, piped.stderr, told.returncode, told.stderr) == (0, "", 0, "")
    records = [json.loads(line) for line in told.stdout.splitlines()]
    assert [(r["index"], r["sample"]) for r in records] == [(0, 0), (0, 1)]
    assert piped.stdout == records[0]["completion"] + "\n"
    assert records[0]["completion"] != records[1]["completion"]


def test_an_answer_that_was_cut_says_so_and_json_has_its_characters_as_they_are():
    cut = run_here(main, "hi", *BABBLE, "--max-tokens", 3)
    assert (cut.returncode, cut.stderr) == (0, "cut after --max-tokens 3\n")
    line = run_here(main, "hi", *BABBLE, "--max-tokens", 100, "--json").stdout
    assert not line.isascii()
    assert json.dumps(json.loads(line), ensure_ascii=False) + "\n" == line


def test_it_keeps_to_its_share_of_the_memory_and_silences_what_other_packages_tell():
    before = mx.get_memory_limit()

    def told():
        main()
        print(
            mx.get_memory_limit(), *map(os.environ.get, ("TRANSFORMERS_VERBOSITY", "MLX_MAX_OPS_PER_BUFFER"))
        )
        return 0

    unset = ("TRANSFORMERS_VERBOSITY", "MLX_MAX_OPS_PER_BUFFER")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    try:
        done = run_here(
            told, "hi", "--max-tokens", 1, environment={**environment, MEMORY_LIMIT: "3000000000"}
        )
    finally:
        mx.set_memory_limit(before)
    operations = "None" if sys.platform == "darwin" else "1000"
    assert done.stdout.splitlines()[-1] == f"3000000000 error {operations}"


def test_thinking_follows_the_templates_settings_and_its_bound(tmp_path, capsys):
    model = str(write_thinking_model(tmp_path / "model"))
    common = ["What is 12 + 34?", "--model", model, "--json", "--max-tokens", "30"]
    opened = ["--chat-template-kwargs", '{"opens": true}']
    main([*common, *opened, "--think-tokens", "3"])
    bounded = json.loads(capsys.readouterr().out)
    main([*common, *opened])
    free = json.loads(capsys.readouterr().out)
    main(common)
    plain = json.loads(capsys.readouterr().out)
    thoughts, closed, _ = bounded["completion"].partition("</think>")
    assert closed
    assert 0 < len(thoughts) < len(free["completion"].partition("</think>")[0])
    assert (
        bounded["prompt_tokens"] == free["prompt_tokens"] == plain["prompt_tokens"] + 2
    )  # the tag and a line feed


def test_a_bound_on_thinking_needs_a_model_that_thinks():
    with pytest.raises(ConfigError, match="--think-tokens: must be 0 for tiny, whose vocabulary has no tag"):
        main(["hi", "--think-tokens", "3"])


def test_a_checkpoint_is_asked_as_its_run_asked_it(tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).write_text("{}")
    assert prompting_of(str(checkpoint)) == Prompting()  # moved out of its run
    settings = {"enable_thinking": False}
    config = Config.model_validate({"data": {"chat_template_kwargs": settings, "system_prompt": "Sum."}})
    (checkpoint.parent / CONFIG_FILE).write_text(config.model_dump_json())
    assert prompting_of(str(checkpoint)) == Prompting("Sum.", settings)
    # What the problems had is what counts: the task may have a prompt of its own, and a mixture several.
    noted = {"problems": 2, "digest": "", "system_prompt": "Think."}
    (checkpoint.parent / DATA_FILE).write_text(json.dumps(noted))
    assert prompting_of(str(checkpoint)) == Prompting("Think.", settings)
    assert prompting_of("tiny") == Prompting()


def test_settings_of_the_template_are_a_json_object(capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--chat-template-kwargs", "3"])
    assert ended.value.code == 2
    assert "must be a JSON object, got '3'" in capsys.readouterr().err


def test_an_answer_is_written_while_it_is_sampled():
    asked = ["hi", *BABBLE, "--max-tokens", 600]
    with subprocess.Popen(command(*asked), env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.kill()
        shown = first + process.stdout.read()
    whole = run_here(main, *asked).stdout.encode()
    assert whole.startswith(shown)
    assert len(shown) < len(whole)


# --- a file of prompts ----------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [{"prompt": f"What is {n} + {2 * n}?", "id": f"q{n}"} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def wait_for_lines(path, count, process):
    end_s = time.monotonic() + HANG_S
    while True:
        has_ended = process.poll() is not None  # before the look: it may write the rest and end meanwhile
        if path.exists() and len(lines(path)) >= count:
            return
        assert not has_ended
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_batch_that_was_killed_continues_and_ends_like_an_uninterrupted_one(tmp_path, questions):
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    arguments = ["--batch", questions, "--samples", 2, "--max-tokens", 60]
    with subprocess.Popen(
        command(*arguments, "--output", killed, "--batch-size", 3), env=ENVIRONMENT, stderr=subprocess.PIPE
    ) as process:
        wait_for_lines(killed, 7, process)
        process.send_signal(signal.SIGKILL)
    before = lines(killed)
    assert len(before) < 40, "killed in the middle"
    with killed.open("a") as file:
        file.write('{"index": 19, "sam')  # what a kill within a write leaves

    resumed = run_here(main, *arguments, "--output", killed, "--batch-size", 5)
    assert resumed.returncode == 0
    assert "the last line of the output was cut" in resumed.stderr
    assert f"{len(before)} of 40 completions are there already" in resumed.stderr
    done = run_here(main, *arguments, "--output", whole)
    assert done.returncode == 0
    said = re.fullmatch(r"(\d+) completions, ([\d,]+) tokens in [\d.]+ s \([\d,.]+ tokens/s\)\n", done.stderr)
    count, tokens = (int(number.replace(",", "")) for number in said.groups())
    assert (count, tokens) == (40, sum(record["completion_tokens"] for record in lines(whole)))
    assert f"\n{40 - len(before)} completions, " in resumed.stderr

    assert lines(killed)[: len(before)] == before, "what was there is as it was"
    by_place = lambda record: (record["index"], record["sample"])  # noqa: E731
    assert sorted(lines(killed), key=by_place) == sorted(lines(whole), key=by_place)
    assert sorted(map(by_place, lines(whole))) == [(i, s) for i in range(20) for s in range(2)]
    assert all(record["id"] == f"q{record['index']}" for record in lines(whole))

    other = run_here(main, *arguments, "--output", whole, "--seed", 1)
    assert other.returncode == 2
    assert other.stderr == (
        f"error: {whole}: was begun with seed = 0, got 1; give the same again, or choose another --output\n"
    )
    assert len(lines(whole)) == 40


def test_a_batch_in_a_terminal_shows_how_much_is_done_and_how_fast(tmp_path, monkeypatch, capsys):
    asked, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    asked.write_text("1 + 1\n2 + 2\n")
    arguments = ["--batch", str(asked), "--output", str(out), "--samples", "2", "--max-tokens", "8"]
    main(arguments)
    assert json.loads(job_file(out).read_text())["model"] == "tiny"
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:3]))
    capsys.readouterr()
    controller, terminal = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with (
        os.fdopen(controller, "rb", buffering=0) as shown,
        os.fdopen(terminal, "w") as errors,
        monkeypatch.context() as patched,
    ):
        patched.setattr("sys.stderr", errors)
        main(arguments)
        errors.flush()
        text = shown.read(65536).decode()
    assert capsys.readouterr().out == ""
    assert "3 of 4 completions are there already" in text
    assert re.search(r"3/4.*4/4.* [\d,]+\.\d tokens/s", text, re.DOTALL)
    # What is refused, is refused before the model is loaded: this folder has none.
    with pytest.raises(ConfigError, match="was begun with model = 'tiny'"):
        main([*arguments, "--model", str(tmp_path)])
    asked.write_text("1 + 1\n3 + 3\n")
    with pytest.raises(ConfigError, match="was begun with input = "):
        main(arguments)


def test_a_bad_line_is_a_one_line_error_before_any_model_is_loaded(tmp_path):
    bad = tmp_path / "in.jsonl"
    bad.write_text('{"prompt": "a"}\n{"prompt": 5}\n')
    done = run_here(main, "--batch", bad, "--output", tmp_path / "out.jsonl", "--model", tmp_path / "absent")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {bad}:2: prompt must be a text, got 5; mend the line\n"
    assert list(tmp_path.iterdir()) == [bad]


def test_a_prompt_that_is_too_long_is_named_before_anything_is_written(tmp_path):
    long = tmp_path / "in.txt"
    long.write_text("1 + 1\n" + "1 + 1 " * 100 + "\n")
    with pytest.raises(
        DataError, match=r"in.txt:2: prompt and answer may have 100 tokens, got .*--max-tokens 50"
    ):
        main(
            [
                *("--batch", str(long), "--output", str(tmp_path / "out.jsonl")),
                *("--max-context", "100", "--max-tokens", "50"),
            ]
        )
    assert list(tmp_path.iterdir()) == [long]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--temperature", "-1"], "--temperature must be ≥ 0 and finite (0: greedy), got -1.0"),
        (["--temperature", "nan"], "--temperature must be ≥ 0"),
        (["--temperature", "inf"], "--temperature must be ≥ 0"),
        (["--top-p", "1.1"], "--top-p must be > 0 and ≤ 1"),
        (["--min-p", "-0.1"], "--min-p must be ≥ 0"),
        (["--repetition-penalty", "inf"], "--repetition-penalty must be > 0"),
        (["--think-tokens", "-1"], "--think-tokens must be ≥ 0"),
        (["--top-p", "0"], "--top-p must be > 0 and ≤ 1, got 0.0"),
        (["--top-k", "-1"], "--top-k must be ≥ 0"),
        (["--min-p", "1"], "--min-p must be ≥ 0 and < 1"),
        (["--repetition-penalty", "0"], "--repetition-penalty must be > 0"),
        (["--max-tokens", "0"], "--max-tokens must be ≥ 1, got 0"),
        (["--max-context", "-1"], "--max-context must be ≥ 0"),
        (["--seed", "-1"], "--seed must be ≥ 0"),
        (["--samples", "0"], "--samples must be ≥ 1"),
        (["--samples", "2"], "--samples of one prompt needs --json"),
        (["--batch-size", "0"], "--batch-size must be ≥ 1"),
        (["--batch", "in"], "--batch needs --output"),
        (["--output", "out"], "--output needs --batch"),
        (["hi", "--batch", "in", "--output", "out"], "leave out PROMPT"),
        (["--json", "--batch", "in", "--output", "out"], "--json is for one prompt"),
        (["--raw", "--system", "be brief"], "--raw continues the text as it is"),
        (["--system", "\udcff"], "--system must be UTF-8"),
    ],
)
def test_a_value_out_of_bounds_and_a_contradiction_are_refused(arguments, rule):
    with pytest.raises(ConfigError) as caught:
        main(arguments)
    assert rule in str(caught.value)


def test_the_bounds_themselves_are_allowed_and_the_defaults_filter_nothing():
    zero = ("temperature", "top-k", "min-p", "max-context", "think-tokens", "seed")
    one = ("top-p", "max-tokens", "samples", "batch-size")
    given = [*(f"--{name}=0" for name in zero), *(f"--{name}=1" for name in one)]
    options = parser().parse_args(["hi", *given])
    check(options)
    assert params_of(options) == SamplingParams(1, temperature=0.0)
    plain = parser().parse_args([])
    check(plain)
    assert params_of(plain) == SamplingParams(512, temperature=0.7)
    assert (plain.max_context, plain.seed, plain.samples, plain.batch_size) == (0, 0, 1, 32)
    for several in (["--json"], ["--batch", "in", "--output", "out"]):
        check(parser().parse_args(["--samples", "2", *several]))


def test_a_chat_has_the_options_of_a_prompt_with_the_same_defaults():
    options = chat_parser("grpo chat").parse_args([])
    check(options)
    assert vars(options) == vars(parser().parse_args([])) | {"batch_size": 1}


def test_a_chat_without_a_terminal_is_refused(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi"))
    with pytest.raises(ConfigError, match="a chat needs a terminal; grpo generate takes a prompt"):
        chat_main([], "grpo chat")


@contextmanager
def in_a_terminal(monkeypatch):
    """Let standard input and output be a terminal, in which Ctrl-D is typed."""
    keys, terminal = pty.openpty()
    with (
        os.fdopen(keys, "wb", buffering=0) as keyboard,
        os.fdopen(os.dup(terminal)) as reads,
        os.fdopen(terminal, "w") as writes,
        monkeypatch.context() as patched,
    ):
        # Within the test: pytest sets the streams anew before each call.
        patched.setattr("sys.stdin", reads)
        patched.setattr("sys.stdout", writes)
        keyboard.write(b"\x04")
        yield patched


@pytest.mark.parametrize("options", [["--raw"], ["--json"], []])
def test_a_chat_with_an_output_for_programs_is_refused(options, monkeypatch):
    with in_a_terminal(monkeypatch) as patched:
        if not options:
            patched.setattr("sys.stdout", io.StringIO())
        with pytest.raises(ConfigError, match="a chat needs a terminal and works without --raw and --json"):
            main(options)


def test_a_chat_with_a_model_that_has_no_template_ends_before_the_first_question(monkeypatch, tmp_path):
    model = write_thinking_model(tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with (
        in_a_terminal(monkeypatch),
        pytest.raises(ModelError, match="its tokenizer has no chat template"),
    ):
        main(["--model", str(model)])


def test_standard_input_that_is_no_text_is_refused_with_its_first_wrong_byte(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"12 + \xfe\xff")))
    with pytest.raises(DataError, match="standard input must be UTF-8, got byte 0xfe"):
        main([])


@pytest.mark.parametrize("prompt", ["", "  ", "\udcff"])
def test_a_prompt_that_is_no_text_is_refused(prompt):
    with pytest.raises(DataError, match="PROMPT must be a text in UTF-8"):
        main([prompt])
