"""The command of an export: what it refuses before anything is read, and what it writes and prints."""

import sys

import mlx.core as mx
import pytest
from written import write_checkpoint

from grpo_actors.config import Config, LearnerConfig, ModelConfig
from grpo_actors.errors import ConfigError, GrpoActorsError, ModelError, RunError
from grpo_actors.export.__main__ import main
from grpo_actors.policy.model import load_policy
from grpo_actors.policy.training import Training


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
    with pytest.raises(RunError, match=r"is no run folder \(config\.json not found\)"):
        main([str(tmp_path), *options.split()])


def never_called(*_):
    raise AssertionError("nothing trains here")


@pytest.fixture
def exported(tmp_path, monkeypatch, capsys):
    """Return a function that exports an adapter on a base of so many bits, and returns the printed lines."""
    monkeypatch.chdir(tmp_path)

    def export(*options, bits=0, by=0.05):
        run = tmp_path / f"run-{bits}"
        if not run.exists():
            settings = ModelConfig(
                dtype="float32", fine_tune_type="lora", lora_rank=4, lora_scale=2.0, base_bits=bits
            )
            policy = load_policy(settings, seed=0)
            mx.random.seed(1)
            moved = {name: w + by * mx.random.normal(w.shape) for name, w in policy.trainable().items()}
            policy.load_trainable(moved)
            run.mkdir()
            (run / "config.json").write_text(Config(model=settings).model_dump_json())
            write_checkpoint(run, 3, policy, Training(policy.model, LearnerConfig(), never_called), {})
        assert main([str(run), *options]) == 0
        printed = capsys.readouterr().out.splitlines()
        assert printed[0] == f"from    {run / 'checkpoint-3'}"
        return printed[1:]

    return export


@pytest.mark.parametrize("form", ["adapter", "peft"])
def test_an_adapter_is_written_under_the_name_of_its_folder(exported, tmp_path, form):
    assert exported(f"--{form}", "out/mine") == ["wrote   out/mine"]
    assert "\n# mine\n" in (tmp_path / "out" / "mine" / "README.md").read_text()
    assert {"adapter_config.json", "README.md"} < {
        path.name for path in (tmp_path / "out" / "mine").iterdir()
    }


def test_a_model_is_written_with_what_its_adapter_has_lost(exported, tmp_path):
    check, wrote = exported("--fuse", "mine", "--dtype", "float32")
    assert check.startswith("check   mean |Δ log-prob| ")
    assert wrote == "wrote   mine"
    assert "\n# mine\n" in (tmp_path / "mine" / "README.md").read_text()
    with pytest.raises(GrpoActorsError, match="add --overwrite or choose another --fuse"):
        exported("--fuse", "mine")
    assert exported("--fuse", "mine", "--overwrite")[-1] == "wrote   mine"


def test_an_adapter_that_drowns_in_the_rounding_of_its_base_is_a_warning_with_the_cure(exported):
    # A young adapter, as in the tests of the figures.
    check, warning, wrote = exported("--fuse", "packed", bits=4, by=0.005)
    assert check.startswith("check ")
    assert (
        warning
        == "warning rounding the sum of base and adapter loses much of what was learned; take --dequantize"
    )
    assert wrote == "wrote   packed"
    with pytest.raises(ModelError, match="the weights are quantised; add --dequantize"):
        exported("--fuse", "other", "--dtype", "float32", bits=4)
