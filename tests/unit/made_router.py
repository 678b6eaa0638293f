"""A run folder that tests of the router read: what tests of replay have, with item statistics and labels."""

from types import SimpleNamespace

from made_replay import NAMES, config_of, made_run

from launch.replay import make_labels
from trainer import item_statistics
from trainer.item_statistics import count_items
from trainer.item_value import fit_item_value
from trainer.neighbors import ChannelSnapshots
from trainer.sequences import SequenceStore
from trainer.triggers import is_validation_user


def made_router_run(folder, shards=3):
    """Its config, too."""
    made_run(folder, shards)
    config, store = config_of(folder), SequenceStore(folder / "sequences")
    snapshots = ChannelSnapshots(folder / "channels", config.channels, store.vocabulary, NAMES)
    for snapshot in snapshots.snapshots[0]:
        item_statistics.publish(folder / "channels", snapshot.watermark_ms, count_items(store, snapshot.watermark_ms),
                                store.vocabulary, {})
    make_labels(config, folder, SimpleNamespace(each=lambda task, numbers: [task(number) for number in numbers]))
    config = config.model_copy(update={
        "router": config.router.model_copy(update={"batch_requests": 7, "validation_share": 0.3, "history": 4}),
        "train": config.train.model_copy(update={"shuffle_shards": 2})})
    fit_item_value(config, folder, lambda user_ids: ~is_validation_user(user_ids, config))
    return config
