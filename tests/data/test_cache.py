"""Files of the cache are whole or not there, and one process writes each."""

import logging
import multiprocessing
import os
import signal
import time

import pytest

from rlmod.data import _cache
from rlmod.data._cache import Writer, obtain, read_stored


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(_cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(content: bytes = b"0123456789"):
    writer = Writer()
    writer.write(content)
    return writer, {"fact": 1}


def never():
    pytest.fail("the file was made again")


def test_a_file_is_made_once_and_read_afterwards(folder):
    first, second = obtain("a", made, 1), obtain("a", never, 1)
    assert bytes(first.payload) == bytes(second.payload) == b"0123456789"
    assert second.facts["fact"] == 1
    assert [file.name for file in folder.iterdir()] == ["a"]


def test_an_empty_payload_and_no_payload_at_all(folder):
    assert bytes(obtain("empty", lambda: made(b""), 1).payload) == b""
    assert obtain("empty", never, 1).facts["fact"] == 1
    assert obtain("nothing", lambda: None, 1) is None
    assert obtain("nothing", never, 1) is None


def truncate(data: bytes) -> bytes:
    return data[:-20]


def cut_in_the_middle(data: bytes) -> bytes:
    return data[:4] + data[6:]


def alter(data: bytes) -> bytes:
    return data[:3] + b"X" + data[4:]


def alter_the_trailer(data: bytes) -> bytes:
    return data.replace(b'"fact": 1', b'"fact": 2')


@pytest.mark.parametrize(
    "damage",
    [truncate, cut_in_the_middle, alter, alter_the_trailer, lambda _: b"", lambda _: b"another program's file" * 9],
)
def test_a_damaged_or_foreign_file_is_written_anew(damage, folder, caplog):
    obtain("a", made, 1)
    whole = (folder / "a").read_bytes()
    (folder / "a").write_bytes(damage(whole))
    assert bytes(obtain("a", made, 1).payload) == b"0123456789"
    assert "a is not a whole file of the cache" in caplog.text
    assert (folder / "a").read_bytes() == whole


def test_a_file_under_another_name_is_not_taken(folder, caplog):
    obtain("a", made, 1)
    (folder / "a").rename(folder / "b")
    assert read_stored(folder / "b") is None
    assert "it was written as a" in caplog.text


def test_a_map_outlives_its_file(folder):
    stored = obtain("a", made, 1)
    (folder / "a").unlink()
    stored.forget()
    assert bytes(stored.payload) == b"0123456789"


def in_processes(function, number: int = 2):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=function, args=(i,)) for i in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_of_two_runs_at_once_one_writes_and_the_other_waits(folder, tmp_path):
    def run(number):
        def slow():
            (tmp_path / f"made-{number}").touch()
            time.sleep(1)
            return made()

        assert bytes(obtain("a", slow, 60).payload) == b"0123456789"

    assert in_processes(run) == [0, 0]
    assert len(list(tmp_path.glob("made-*"))) == 1
    assert [file.name for file in folder.iterdir()] == ["a"]


def test_another_rank_of_the_node_waits_for_the_file(folder, tmp_path):
    def run(rank):
        os.environ["LOCAL_RANK"] = str(rank)
        if rank == 0:
            time.sleep(0.5)
        assert bytes(obtain("a", made if rank == 0 else never, 60).payload) == b"0123456789"

    assert in_processes(run, 3) == [0, 0, 0]


def test_a_rank_waits_no_longer_than_the_limit(folder, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match=r"rank 0 of this node has not written .*a within guard\.rank_timeout=0 s"):
        obtain("a", never, 0.3)


def test_a_run_does_not_wait_forever_for_another_one(folder, caplog):
    obtain("b", made, 1)
    with _cache._only_writer(folder / "a", 1):
        assert not caplog.text
        with _cache._only_writer(folder / "a", 0.3):
            pass
    assert "waiting for another process, which writes" in caplog.text
    assert "this one no longer waits for it" in caplog.text


def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(folder):
    def run(_):
        def killed():
            writer, _ = made()
            writer.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        obtain("a", killed, 60)

    assert in_processes(run, 1) == [-signal.SIGKILL]
    left = [file for file in folder.iterdir() if file.name.startswith(".partial-rlmod-")]
    assert len(left) == 1
    assert read_stored(folder / "a") is None
    os.utime(left[0], (0, 0))
    assert bytes(obtain("a", made, 1).payload) == b"0123456789"
    assert [file.name for file in folder.iterdir()] == ["a"]


def test_a_failed_writer_leaves_nothing(folder):
    def fails():
        _ = made()
        raise ValueError("a bad record")

    with pytest.raises(ValueError, match="a bad record"):
        obtain("a", fails, 1)
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_written_gets_a_warning_and_no_cache(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv(_cache.VARIABLE, str(tmp_path / "file" / "cache"))
    assert obtain("a", never, 1) is None
    assert obtain("a", never, 1) is None
    assert [r.levelno for r in caplog.records if r.name == _cache.__name__] == [logging.WARNING]
    assert f"{tmp_path}/file/cache cannot be written" in caplog.text
    writer = Writer()  # in the folder for temporary files
    assert writer.path.is_file()
    writer.write(b"12")
    stored, path = writer.stored({}), writer.path
    del writer
    assert not path.exists()
    assert bytes(stored.payload) == b"12"


def test_a_full_disk_is_named(folder, monkeypatch):
    writer = Writer()
    monkeypatch.setattr(writer, "file", open("/dev/full", "wb", buffering=0))  # noqa: SIM115
    with pytest.raises(ValueError, match=rf"{folder}, which cannot be written to its end .*RLMOD_CACHE"):
        writer.write(b"12")


@pytest.mark.parametrize(
    ("name", "base", "expected"), [(None, None, ".cache/rlmod"), (None, "x", "x/rlmod"), ("y", "x", "y")]
)
def test_the_folder(name, base, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable, value in ((_cache.VARIABLE, name), ("XDG_CACHE_HOME", base)):
        monkeypatch.delenv(variable, raising=False)
        if value is not None:
            monkeypatch.setenv(variable, str(tmp_path / value))
    assert _cache.cache_folder() == tmp_path / expected


def test_an_empty_variable_is_no_cache(monkeypatch):
    monkeypatch.setenv(_cache.VARIABLE, "")
    assert obtain("a", never, 1) is None


def test_a_file_may_be_read_by_other_users_as_the_umask_says(folder):
    before = os.umask(0o022)
    try:
        obtain("a", made, 1)
    finally:
        os.umask(before)
    assert (folder / "a").stat().st_mode & 0o777 == 0o644


def test_a_lock_of_another_user_does_not_end_the_run(folder, caplog):
    folder.mkdir(parents=True)
    (folder / ".lock-a").mkdir()  # cannot be opened for writing, whoever asks
    assert bytes(obtain("a", made, 1).payload) == b"0123456789"
    assert "writes without a lock" in caplog.text


def test_a_full_disk_is_named_wherever_it_is_noticed(folder, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(_cache.os, name, full)
            with pytest.raises(ValueError, match=rf"cannot be written to its end .*{_cache.VARIABLE}"):
                obtain(f"b-{name}", made, 1)
    writer = Writer()
    writer.write(b"0")
    monkeypatch.setattr(writer, "file", type("Full", (), {"flush": staticmethod(full)})())
    with pytest.raises(ValueError, match=r"cannot be written to its end"):
        writer.flush()
