"""The tests of the page need its extra; without it they are skipped by name."""

import pytest

pytest.importorskip("bokeh", reason="needs the extra: pip install 'grpo-actors[page]'")
