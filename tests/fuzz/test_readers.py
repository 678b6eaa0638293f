"""Every reader against files that somebody changed: one clear error, a counted quarantine or a sound result.

The long run over the same readers is `make fuzz` (tests/fuzz/long_run.py), guided by coverage.
"""

import pytest
from changes import changes
from formats import FORMATS, Bench
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

INPUTS = 25  # tried of each format


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    scratch, made = tmp_path_factory.mktemp("fuzz"), {}

    def bench(of):
        if of.name not in made:
            made[of.name] = Bench(of, scratch)
        return made[of.name]
    return bench


@pytest.mark.parametrize("of", FORMATS, ids=[of.name for of in FORMATS])
def test_a_changed_file_is_refused_or_read_as_something_sound(benches, of):
    bench = benches(of)

    @settings(max_examples=INPUTS, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(st.data())
    def hold(data):
        bench.outcome(data.draw(changes(of.kind, bench.valid)))

    hold()
