"""Secrets never enter messages, events, the saved config or any other file of a run."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import secrets
from configs.errors import InputError, QualityGateError, WatchtowerError
from configs.loader import load, save_resolved
from configs.schema import Config
from configs.secrets import HIDDEN, redact, redacted
from launch import cli
from trainer.events import EventLog, read_events

SECRET = "wJalrXUtnFEMI/K7MDENG"


@pytest.mark.parametrize(("text", "left"), [
    (f"s3://AKIAABCDEFGHIJKLMNOP:{SECRET}@bucket/logs", f"s3://{HIDDEN}@bucket/logs"),
    ("hdfs://user:pass@host:9000/x", f"hdfs://{HIDDEN}@host:9000/x"),
    ("https://token123@host/x", f"https://{HIDDEN}@host/x"),
    ("s3://b/x?access_key=AB&secret_key=CD&region=eu", f"s3://b/x?access_key={HIDDEN}&secret_key={HIDDEN}&region=eu"),
    ("https://h/x?X-Amz-Signature=ab12&X-Amz-Credential=c%2Fd&part=2",
     f"https://h/x?X-Amz-Signature={HIDDEN}&X-Amz-Credential={HIDDEN}&part=2"),
    ("https://h/x?sv=1&sig=ab%3D", f"https://h/x?sv=1&sig={HIDDEN}"),
    ("Authorization: Bearer abc.def", f"Authorization: Bearer {HIDDEN}"),
    ("secret_access_key=abc, region", f"secret_access_key={HIDDEN}, region"),
    ("{'password': 'abc'}", f"{{'password': '{HIDDEN}'}}"),
    ("found AKIAABCDEFGHIJKLMNOP there", f"found {HIDDEN} there"),
])
def test_secrets_are_taken_out(text, left):
    assert redact(text) == left
    assert redact(left) == left


@pytest.mark.parametrize("text", [
    "s3://bucket/logs/day=2026-01-01/part@2.parquet", "hdfs://host:9000/a@b", "tokens: 5", "127.0.0.1:6379",
    "train.learning_rate=0.1", "/data/logs.parquet", "crm.dnn.recall@100 is 0.1", "https://host/x?part=2",
])
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_the_values_of_secret_variables_are_taken_out_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/tmp/folder/token")
    assert redact(f"failed with {SECRET}!") == f"failed with {HIDDEN}!"
    assert redact("/tmp/folder/token") == "/tmp/folder/token"
    assert redacted({"a": [SECRET, 1, None], SECRET: (SECRET,)}) == {"a": [HIDDEN, 1, None], HIDDEN: [HIDDEN]}


def thorough(text):
    """`redact` without a look at what a text could hold: every rule, every variable."""
    for pattern, instead in secrets._RULES:
        text = pattern.sub(instead, text)
    found = {value for name, value in os.environ.items()
             if len(value) >= secrets._LEAST_LENGTH and secrets._SECRET_VARIABLE.search(name.upper())}
    for value in sorted(found, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return text


PIECES = st.sampled_from([
    "s3://", "@", ":", "=", " ", "/", "?", "&", "'", "user", "Bearer", "bEARER \t", "Authorization",
    "pa\u017f\u017fword", "to\u212aen", "api_\u212aey", "AKIA", "ASIA", "ABCDEFGHIJ012345", "secret_key", "sig",
    "token", "value", "value-of-mine", "-of-mine", "12345678", "\n"])


@given(st.lists(PIECES | st.text(max_size=3)).map("".join), st.sampled_from(["MY_TOKEN", "my_password", "MY_PLACE"]))
def test_the_quick_look_changes_nothing(text, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, "value-of-mine")
        assert redact(text) == thorough(text)
    assert redact(text) == thorough(text)


@given(st.text())
def test_any_text_is_taken_and_twice_is_no_more_than_once(text):
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize("kind", [WatchtowerError, InputError, QualityGateError])
def test_no_error_of_ours_holds_a_secret(kind):
    assert SECRET not in str(kind(f"s3://KEY:{SECRET}@bucket: cannot be read"))


def test_events_the_saved_config_and_the_error_log_hold_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_API_KEY", "key-of-mine-123")
    location = f"s3://KEY:{SECRET}@bucket/logs"
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write("warning", message=f"{location} is slow", where=[location], nested={"key": "key-of-mine-123"})
    assert SECRET not in (tmp_path / "events.jsonl").read_text()
    assert next(read_events(tmp_path / "events.jsonl"))["nested"] == {"key": HIDDEN}
    config = Config(data={"logs": location}, run_dir=str(tmp_path))
    save_resolved(config, tmp_path / "config.yaml")
    assert SECRET not in (tmp_path / "config.yaml").read_text()
    with pytest.raises(InputError, match="give data.logs=... again"):
        load(tmp_path)
    assert load(tmp_path, [f"data.logs={location}"]).data.logs == location
    cli._fail(RuntimeError(f"no {location}"), str(tmp_path))
    (written,) = tmp_path.glob("error-*.log")
    assert SECRET not in written.read_text() + capsys.readouterr().err


def test_the_command_line_shows_none(tmp_path, capsys):
    assert cli.main(["run", str(tmp_path / "no.yaml"), f"data.logs=s3://KEY:{SECRET}@b"]) == 2
    assert cli.main(["run", "configs/smoke.yaml", f"nonsense=s3://KEY:{SECRET}@b"]) == 2
    assert SECRET not in capsys.readouterr().err


def test_json_that_holds_a_secret_as_a_key_is_still_json():
    assert json.loads(json.dumps(redacted({"https://u:p@h/x": 1}))) == {f"https://{HIDDEN}@h/x": 1}
