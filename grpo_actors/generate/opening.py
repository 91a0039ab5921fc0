"""Open the model that a command line or a program names, to sample from it as asked. Loads MLX late: it takes a second."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo_actors.generate.generator import Generator
    from grpo_actors.policy.decoding.sampling import SamplingParams
    from grpo_actors.policy.model import Policy


def resolve_model(options: argparse.Namespace) -> None:
    """Resolve the user's names of model and adapter to a folder or hub id, and what is not given to the run's own.

    The latter are the system prompt and the template's settings. Works in place; may be called twice.
    """
    from grpo_actors.rundir.naming import resolve  # noqa: PLC0415  MLX takes a second to import
    from grpo_actors.rundir.prompting import notice, prompting_of  # noqa: PLC0415

    if options.adapter is not None:
        options.adapter = resolve(options.adapter)
    elif options.model is None:
        options.model = "tiny"
    if options.model is not None:
        options.model = resolve(options.model)
    trained = prompting_of(str(options.adapter or options.model))
    if options.chat_template_kwargs is None:
        options.chat_template_kwargs = dict(trained.template_settings)
        if trained.template_settings:
            settings = json.dumps(options.chat_template_kwargs, ensure_ascii=False)
            print(f"note: with the chat template's settings of the training, {settings}", file=sys.stderr)
    if options.system is None:
        options.system = "" if options.raw or options.no_system else trained.system
        if options.system:
            print(notice(options.system), file=sys.stderr)


def params_of(options: argparse.Namespace) -> "SamplingParams":
    """Return the sampling parameters that the options name."""
    from grpo_actors.policy.decoding.sampling import SamplingParams  # noqa: PLC0415  MLX takes a second to import

    return SamplingParams(
        max_new_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        think_tokens=options.think_tokens,
    )


def open_model(options: argparse.Namespace) -> "Policy":
    """Load the model, which takes seconds, with the prompt that it was trained with.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: the adapter does not fit the model.
    """
    from grpo_actors.policy.carried import NO_SYSTEM, carried_system, template_text  # noqa: PLC0415
    from grpo_actors.rundir.naming import open_policy  # noqa: PLC0415  MLX takes a second to import
    from grpo_actors.rundir.prompting import notice  # noqa: PLC0415

    resolve_model(options)
    policy = open_policy(options.model, options.adapter)
    policy.chat.settings = options.chat_template_kwargs
    if carried := carried_system(template_text(policy.tokenizer)):
        if options.no_system:
            policy.chat.settings = {**policy.chat.settings, NO_SYSTEM: True}
        elif not options.system and not options.raw:
            print(notice(carried), file=sys.stderr)
    return policy


def open_generator(options: argparse.Namespace) -> "Generator":
    """Load the model, as `open_model`, to sample as the options say."""
    return generator_of(open_model(options), options)


def generator_of(policy: "Policy", options: argparse.Namespace) -> "Generator":
    """Return what samples from a loaded model as the options say.

    Raises:
        ConfigError: the model has no tags between which thinking could be bounded.
    """
    from grpo_actors.generate.generator import Generator  # noqa: PLC0415
    from grpo_actors.policy.decoding.rows import require_bound  # noqa: PLC0415

    require_bound(policy, options.think_tokens, options.max_tokens, "--think-tokens")
    return Generator(policy, params_of(options), options.seed, options.max_context)
