"""Options of an export that do not go together, refused before anything is read."""

import sys

import pytest

from grpo_actors.errors import ConfigError
from grpo_actors.export.__main__ import main


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("", "nothing to do; add --fuse DIR, --adapter DIR, --peft DIR, --gguf FILE or --upload OWNER/NAME"),
        ("--dequantize", "nothing to do"),
        (
            "--gguf a.gguf --upload a/b",
            "--upload sends folders: it goes with --fuse, --adapter or --peft, or alone",
        ),
        (
            "--adapter a --dtype float32",
            "--adapter takes the adapter as it is; --dtype and --dequantize go with",
        ),
        ("--adapter a --dequantize", "--adapter takes the adapter as it is"),
        ("--peft a --dtype float32", "--peft takes the adapter as it is"),
        ("--peft a --dequantize", "--peft takes the adapter as it is"),
        ("--fuse a --public", "--public: goes with --upload OWNER/NAME"),
        ("--gguf a.gguf", "--gguf: the gguf package is not installed; pip install 'grpo-actors[gguf]'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, says, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError) as caught:
        main([str(tmp_path), *options.split()])
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    "options", ["--fuse a --dtype float32", "--fuse a --dequantize", "--adapter a", "--peft a"]
)
def test_others_go_on_to_the_run(options, tmp_path):
    with pytest.raises(Exception, match=r"is no run folder \(config\.json not found\)"):
        main([str(tmp_path), *options.split()])
