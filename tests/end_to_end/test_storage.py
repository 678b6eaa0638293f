"""Run folder and logs on a real S3 server, which also fails as stores and networks do."""

import contextlib
import hashlib
import http.client
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs.errors import InputError, WatchtowerError
from configs.loader import load, save_resolved
from embeddings import snapshots
from launch.remote import OWNER, RemoteFolder, Store, Unreachable, load_config
from trainer.events import read_events
from trainer.world import WorldSpec, write_world

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from remote_runs import FAST, act, begun, behind, carried, fill, made, publish, put, taken, tree  # noqa: E402
from s3_server import Proxy, s3_server, url_of  # noqa: E402


@pytest.fixture(scope="module")
def server():
    with s3_server() as address:
        yield address


@pytest.fixture
def place(tmp_path):
    return f"runs/{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]}/a-run"


@pytest.fixture
def url(server, place):
    return url_of(server, place)


@pytest.fixture
def folder(tmp_path):
    return made(tmp_path / "work")


@pytest.mark.parametrize("kind", ["s3", "folders"])
def test_there_and_back(kind, url, folder, tmp_path):
    url = url if kind == "s3" else (tmp_path / "store" / "run").as_uri()  # a store that has folders, and moves
    expected, other = begun(url, folder), made(tmp_path / "other")
    carried(url, folder)
    assert behind(url) == expected
    assert not [name for name in Store(url).list() if "/beat-" in name or ".tmp" in name]
    Store(url).delete(OWNER)  # as if it were copied there by hand
    carried(url, other)
    assert tree(other) == behind(url) == expected
    snapshots.verify(other / "sequences", "deep/more.bin")


def test_what_changes_is_carried_and_nothing_else(server, place, url, folder):
    with Proxy(server) as proxy:
        one = taken(url_of(proxy.address, place), folder)
        fill(folder)
        one.push(everything=True)
        proxy.asked.clear()
        one.push(everything=True)
        assert {method for method, _ in proxy.asked} <= {"GET", "HEAD"}, "nothing is new"
        publish(folder, "sequences", "other events")
        snapshots.remove(folder / "channels/swing/1000")
        put(folder, "events.jsonl", {"event": "another"})
        put(folder, "stages/ingest.json", {"inputs": "b"})
        proxy.asked.clear()
        one.push(everything=True)
        written = {path.partition("?")[0].partition("/a-run/")[2] for method, path in proxy.asked
                   if method in ("PUT", "POST")}
        assert {name for name in written if name and not name.endswith("/")} == {  # but what stands for a folder
            "sequences/data.bin", "sequences/deep/more.bin", "sequences/manifest.json", "events.jsonl",
            "stages/ingest.json"}
    assert behind(url) == {name: data for name, data in tree(folder).items()
                           if not name.startswith(("router_features", "."))}


def test_what_fails_for_a_while_is_tried_again(server, place, url, folder, tmp_path):
    """One request of five ends with an error of the server, a broken connection, half an answer, or late."""
    expected, other = begun(url, folder), made(tmp_path / "other")
    with Proxy(server) as proxy:
        number, faults = itertools.count(), itertools.cycle(["500", "reset", "503", "cut", "slow"])
        proxy.fault = lambda method, path: next(faults) if next(number) % 5 == 0 else None
        through = url_of(proxy.address, place)
        carried(through, folder, attempts=8)
        carried(through, other, attempts=8)
        assert proxy.faults > 10
    assert behind(url) == expected == tree(other)


def test_a_store_that_is_away_at_the_end_loses_nothing(server, place, url, folder):
    with Proxy(server) as proxy:
        through = url_of(proxy.address, place)
        one = taken(through, folder, attempts=1)
        expected = fill(folder)
        with pytest.raises(WatchtowerError, match=r"could not be .* in 1 tries(.|\n)*whole in .*the same command"):
            with one.carrying():
                proxy.fault = lambda method, path: "500"
        proxy.fault = lambda method, path: None
        carried(through, folder)
    assert behind(url) == expected


def test_taking_that_broke_off_is_done_again(server, place, url, folder, tmp_path):
    expected, other = begun(url, folder), made(tmp_path / "other")
    carried(url, folder)
    with Proxy(server) as proxy:
        proxy.fault = lambda method, path: "500" if method == "GET" and "sequences/data.bin" in path else None
        with pytest.raises(Unreachable, match="sequences/data.bin"):
            RemoteFolder(url_of(proxy.address, place), other, **FAST, attempts=1).take()
    assert not [name for name in Store(url).list() if "/beat-" in name], "nobody waits for it"
    carried(url, other)
    assert tree(other) == behind(url) == expected


def test_one_that_still_takes_is_alive(server, place, url, folder, tmp_path):
    begun(url, folder)
    carried(url, folder)
    goes_on = threading.Event()
    with Proxy(server) as proxy:
        def fault(method, path):
            if method == "GET" and "sequences/data.bin" in path:
                goes_on.wait(60)

        proxy.fault = fault
        # Four beats are waited for, four seconds; with FAST's, 0.2 s, a busy machine's beat may come too late.
        slow = RemoteFolder(url_of(proxy.address, place), made(tmp_path / "slow"), **FAST | {"every_s": 1.0})
        taking = threading.Thread(target=slow.take)
        taking.start()
        try:
            while Store(url).read_json(OWNER)["id"] != slow.id:
                time.sleep(0.01)
            with pytest.raises(WatchtowerError, match="is being written by"):
                RemoteFolder(url, made(tmp_path / "other"), **FAST, attempts=1).take()
        finally:
            goes_on.set()
            taking.join()
            slow._end_beat()


def test_a_name_that_leads_out_is_refused(server, place, url):
    connection = http.client.HTTPConnection(server)
    connection.request("PUT", f"/{place}/a/..%2F..%2Foutside", b"x")
    assert connection.getresponse().status == 200
    with pytest.raises(InputError, match="leads out of the run folder"):
        Store(url).list()


def test_a_refusal_is_told_at_once(server, url, folder):
    with Proxy(server) as proxy:
        proxy.fault = lambda method, path: "403"
        with pytest.raises(InputError, match="cannot be read.*ACCESS_DENIED"):
            RemoteFolder(url_of(proxy.address, "runs/x"), folder, **FAST).take()
        assert len(proxy.asked) <= 2
    with pytest.raises(Unreachable, match="in 1 tries"):
        Store(url_of("127.0.0.1:9", "runs/x"), attempts=1).read("a")


def test_many_threads_see_one_run(url, folder):
    """The thread that carries, while a run publishes, replaces and removes."""
    one = taken(url, folder)
    stop, halves = threading.Event(), []

    def read():
        store = Store(url)
        while not stop.is_set():
            for name in [n for n in store.list() if n.endswith("/manifest.json")]:
                top, data = name.removesuffix("/manifest.json"), store.read(name)
                files = {} if data is None else json.loads(data)["files"]
                found = {file: store.read(f"{top}/{file}") for file in files}
                wrong = [file for file, entry in files.items()
                         if found[file] is None or hashlib.sha256(found[file]).hexdigest() != entry["sha256"]]
                if wrong and store.read(name) == data:  # replaced meanwhile: the reader's own checksum has told it
                    halves.append(top)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with one.carrying():
            for number in range(30):
                act(folder, "publish", number % 3, str(number))
                if number % 5 == 0:
                    act(folder, "remove", number % 3, "a")
    finally:
        stop.set()
        reader.join()
    assert not halves
    assert behind(url) == tree(folder)


def test_the_config_of_a_run_behind_a_url(url, repository, tmp_path):
    with pytest.raises(InputError, match="there is no config.yaml of a run"):
        load_config(url)
    config = load(repository / "configs/smoke.yaml", [f"run_dir={url}", "seeds=[3]"])
    save_resolved(config, tmp_path / "config.yaml")
    Store(url).write("config.yaml", (tmp_path / "config.yaml").read_bytes())
    assert load_config(url, ["name=b"]) == config.model_copy(update={"name": "b"})
    assert load_config(url, [f"run_dir={tmp_path}"]).run_dir == str(tmp_path)
    with pytest.raises(InputError) as told:
        load_config(url, ["nonsense=1"])
    assert "watchtower-config-" not in str(told.value)


# --- whole runs -------------------------------------------------------------------------------------------------------

REPOSITORY = Path(__file__).resolve().parents[2]


def run(run_dir, *overrides):
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "run", "tests/faults/survive.yaml", f"run_dir={run_dir}", "stages=[crm]",
         "crm.models=[{name: dnn, tower: dnn, condition: next}]", "storage.every_s=0.2", *overrides],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finished(process):
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-4000:]
    return output


def losses(run_dir):
    return {(e["model"], e["step"]): e["loss"] for e in read_events(run_dir / "events.jsonl", "train_step")}


def test_a_run_goes_on_on_another_machine(server, place, tmp_path):
    """Logs and run folder on S3. The driver is killed in training; an empty working folder stands for another
    machine. What comes out is what a run in a folder of this machine comes to, to the bit."""
    write_world(tmp_path / "world", WorldSpec(users=100, items=150, views_per_user=40, days=7, tags_count=150))
    where = place.rpartition("/")[0]
    logs = Store(url_of(server, f"{where}/logs"))
    for path in (tmp_path / "world").rglob("*.parquet"):
        logs.upload(path, path.relative_to(tmp_path / "world").as_posix())
    here = [f"data.logs={tmp_path / 'world' / 'logs'}", f"data.items={tmp_path / 'world' / 'items.parquet'}"]
    there = [f"data.logs={url_of(server, f'{where}/logs/logs')}",
             f"data.items={url_of(server, f'{where}/logs/items.parquet')}"]
    url = url_of(server, place)
    store = Store(url)

    first = run(url, *there, f"storage.work_dir={tmp_path / 'first'}")
    deadline = time.monotonic() + 300
    while not [n for n in store.list() if re.fullmatch(r"checkpoints/dnn/seed=0/step-\d+/manifest.json", n)]:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0][-4000:]
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)

    output = finished(run(url, *there, f"storage.work_dir={tmp_path / 'second'}"))
    assert "gives no sign of life; this run takes its place" in output
    assert "crm: done" in output
    untouched = tmp_path / "untouched"
    finished(run(untouched, *here))
    assert losses(tmp_path / "second") == losses(untouched)
    assert any(read_events(tmp_path / "second" / "events.jsonl", "resume")), "it went on from a checkpoint"

    found = behind(url)
    assert found == {name: data for name, data in tree(tmp_path / "second").items() if not name.startswith("ray/")}
    serving = json.loads(found["indexes/serving.json"])["folder"]
    taken = tmp_path / "taken"
    for name in ("index.faiss", "item_ids.parquet", "manifest.json"):
        taken.mkdir(exist_ok=True)
        store.download(f"{serving}/{name}", taken / name)
        if name == "index.faiss":
            assert (taken / name).read_bytes() == (untouched / serving / name).read_bytes()
    snapshots.verify(taken)

    # A third machine makes the report again: the command takes the URL alone, and nothing else is done again.
    store.delete("report.html")
    again = subprocess.run([sys.executable, "-m", "launch.cli", "report", url,
                            f"storage.work_dir={tmp_path / 'third'}"], cwd=REPOSITORY, capture_output=True, text=True)
    assert again.returncode == 0 and "report: done" in again.stdout, again.stdout + again.stderr
    assert store.read("report.html").rstrip().endswith(b"</html>")
    assert not any(event["stage"] != "report" for event in read_events(tmp_path / "third" / "events.jsonl", "stage")
                   if event["time"] > max(e["time"] for e in read_events(tmp_path / "second" / "events.jsonl")))
