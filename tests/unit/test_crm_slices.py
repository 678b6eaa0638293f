"""CRM's data over slices that are given: the tower of the embedding channel may know nothing after its watermarks."""

import numpy as np
import pytest
from made_replay import BEGIN_MS, DAY_MS, config_of, made_run

from configs.errors import InputError
from configs.schema import ModelConfig
from trainer.crm_data import CrmData
from trainer.triggers import is_routing_test_user
from trainer.windows import target_rows

ENDS = [BEGIN_MS + 3 * DAY_MS, BEGIN_MS + 5 * DAY_MS]
TOWER = ModelConfig(name="channel-embedding", tower="dnn", condition="none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("slices") / "run", 3)


def made(folder, ends=ENDS, config=None):
    return CrmData(config or config_of(folder), folder, slices=list(zip([None, *ends[:-1]], ends, strict=True)))


def targets_before(data, end_ms):
    """Views of each item that may be targets, counted the plain way."""
    views_N = np.zeros(data.store.vocabulary.rows, np.int64)
    for number in range(data.store.shards):
        shard = data.store.open(number)
        for user, begin, length in zip(shard.user_id_U, shard.offset_U, shard.length_U, strict=True):
            if is_routing_test_user(np.array([user]), data.config)[0]:
                continue
            for event in range(begin, begin + length):
                if shard.is_target_E[event] and shard.timestamp_ms_E[event] < end_ms:
                    views_N[shard.item_row_E[event]] += 1
    return views_N


def test_statistics_end_with_their_slice_and_leave_test_users_out(folder):
    data = made(folder)
    for end in ENDS:
        assert data.statistics_until(end).views_N.tolist() == targets_before(data, end).tolist()
    assert data.statistics.views_N.tolist() == data.statistics_until(ENDS[-1]).views_N.tolist()
    assert not np.array_equal(data.features_until(ENDS[0]).log_q_N, data.features.log_q_N)


def test_the_passes_have_every_target_of_their_slice_once(folder):
    data = made(folder)
    found = []
    for number, time_slice in enumerate(data.slices):
        rows_N = np.zeros(data.store.vocabulary.rows, np.int64)
        for batch in data.plan(TOWER, 0, number, time_slice).batches(0, 1):
            rows_N += np.bincount(target_rows(batch.parts), minlength=len(rows_N))
        found.append(rows_N)
    assert found[0].tolist() == targets_before(data, ENDS[0]).tolist()
    assert (found[0] + found[1]).tolist() == targets_before(data, ENDS[1]).tolist()


def test_nothing_is_validated_or_judged(folder):
    data = made(folder)
    assert len(data.validation) == len(data.test) == 0


def test_other_slices_are_another_training(folder):
    default, one, two = CrmData(config_of(folder), folder), made(folder), made(folder, ENDS[:1])
    assert len({data.requests_fingerprint for data in (default, one, two)}) == 3
    assert made(folder).requests_fingerprint == one.requests_fingerprint


def test_slices_before_the_logs_are_an_error(folder):
    with pytest.raises(InputError, match="the last watermark of the channels"):
        made(folder, [BEGIN_MS - DAY_MS])
