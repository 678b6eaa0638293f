"""Runs of a few bytes for the tests of run folders behind a URL."""

import json

from embeddings import attempts, snapshots
from launch.remote import OWNER, RECORD, RemoteFolder, Store

FAST = {"every_s": 0.05, "wait_s": 0.001}


def made(path):
    path.mkdir()
    return path


def publish(folder, name, text="x", more="y", replace=True):
    def write(into):
        (into / "data.bin").write_text(text)
        (into / "deep").mkdir()
        (into / "deep" / "more.bin").write_text(more)

    return snapshots.publish(folder / name, write, {"of": text}, replace=replace)


def put(folder, name, value):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def fill(folder):
    """A little of everything that a run leaves; returns what of it belongs behind the URL."""
    publish(folder, "sequences", "events")
    publish(folder, "channels/swing/1000", "lists")
    publish(folder, "indexes/dnn/seed=0/1000-7", "vectors")
    put(folder, "indexes/serving.json", {"folder": "indexes/dnn/seed=0/1000-7"})
    put(folder, "stages/ingest.json", {"inputs": "a"})
    put(folder, "stages/inputs/ingest.json", {"reads": 1})
    put(folder, "stages/crm.outcome.json", {"trained": 1})
    put(folder, "events.jsonl", {"event": "stage"})
    put(folder, "metrics.json", {"crm": {}})
    (folder / "routing").mkdir()
    (folder / "routing" / "capts.parquet").write_bytes(b"")  # an empty file is a file
    attempts.begin_driver(folder)
    carried = tree(folder)
    put(folder, "run.lock", {})
    put(folder, "world/world.json", {})
    put(folder, "router_features/ab/shard-0/manifest.json", {})
    put(folder, ".hidden.tmp", {})
    return carried


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and (not path.is_relative_to(folder / attempts.FOLDER) or path == folder / RECORD)
            and path.name != "run.lock" and not path.is_relative_to(folder / "world")}


def behind(url, but=(OWNER,)):
    store = Store(url)
    return {name: store.read(name) for name in store.list() if name not in but and "/beat-" not in name}


def carried(url, folder, **more):
    """A run that takes the folder, does nothing and ends."""
    one = RemoteFolder(url, folder, **FAST, **more)
    one.take()
    with one.carrying():
        pass
    return one


def taken(url, folder, **more):
    """Of a run that gives no sign of life after this."""
    one = RemoteFolder(url, folder, **FAST | more)
    one.take()
    one._is_over.set()
    one._beater.join()
    return one


def begun(url, folder):
    """`folder` as this run left it the last time, with all that a run leaves; what of it belongs behind the URL."""
    expected = fill(folder)
    (folder / "config.yaml").write_text("name: a")
    put(folder, OWNER, {"id": "0" * 32, "url": Store(url).url})
    return expected | {"config.yaml": b"name: a"}


def act(folder, what, number, text):
    """One step of a run: a stage's marker goes before its snapshot changes, and comes after."""
    marker, top = folder / "stages" / f"stage{number}.json", f"channels/swing/{number}"
    if what == "log":
        put(folder, "events.jsonl", {"event": text})
        return
    marker.unlink(missing_ok=True)
    if what == "publish":
        publish(folder, top, text, text * 2)
        put(folder, f"stages/stage{number}.json", {"top": top, "of": text})
    else:
        snapshots.remove(folder / top)
