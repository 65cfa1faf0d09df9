"""ijcnn1: from manual files, from a server, from a prepared set; and what can be wrong with it."""

import bz2
import functools
import http.server
import threading
import time

import numpy as np
import pytest

from examples.datasets import catalog, ijcnn1

ROWS = {"train": 7, "test": 5}


def text(table, label="{:d}"):
    lines = []
    for row, sign in zip(table.inputs, table.labels, strict=True):
        values = " ".join(f"{k + 1}:{value:.6f}" for k, value in enumerate(row) if value)
        lines.append(f"{label.format(sign)} {values}\n")
    return "".join(lines).encode()


@pytest.fixture
def tables(monkeypatch):
    """Two small parts in the place of the real ones, whose names and addresses stay."""
    rng = np.random.default_rng(0)
    found = {}
    for name, rows in ROWS.items():
        inputs = rng.integers(-1_500_000, 1_500_000, size=(rows, 22)) / 1e6
        found[name] = ijcnn1.Table(inputs, rng.choice([-1, 1], size=rows))
        part = ijcnn1.PARTS[name]._replace(known={}, rows=rows, content=ijcnn1.digest(found[name]))
        monkeypatch.setitem(ijcnn1.PARTS, name, part)
    return found


def write(folder, tables, position, label="{:d}"):
    folder.mkdir(exist_ok=True)
    for name, table in tables.items():
        path = folder / ijcnn1.PARTS[name].filenames[position]
        path.write_bytes(bz2.compress(text(table, label)))


def same(found, tables):
    for name, table in tables.items():
        np.testing.assert_array_equal(found[name].inputs, table.inputs, strict=True)
        np.testing.assert_array_equal(found[name].labels, table.labels)


def refused(*args, **kwargs):
    began = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        ijcnn1.load(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message, time.perf_counter() - began


def test_prepared_once_and_read_again_bit_for_bit(tables, tmp_path):
    write(tmp_path / "ijcnn1", tables, 0, "{:.1f}")
    same(ijcnn1.load(tmp_path, tmp_path / "tfds"), tables)
    (tmp_path / "ijcnn1" / "ijcnn1.trn.bz2").unlink()
    same(ijcnn1.load(None, tmp_path / "tfds"), tables)
    decoded = list((tmp_path / "tfds").rglob("*.npz"))
    assert len(decoded) == 1
    decoded[0].unlink()
    same(ijcnn1.load(None, tmp_path / "tfds"), tables)
    record = next((tmp_path / "tfds").rglob("*train.array_record*"))
    record.write_bytes(record.read_bytes()[:-200])
    assert "cannot be read" in refused(None, tmp_path / "tfds")[0]


@pytest.fixture
def server(tables, tmp_path, monkeypatch):
    """A server on this machine, under the addresses of the two parts."""
    folder = tmp_path / "page"
    write(folder, tables, 1)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        for name, part in list(ijcnn1.PARTS.items()):
            url = f"http://127.0.0.1:{running.server_port}/{part.filenames[1]}"
            monkeypatch.setitem(ijcnn1.PARTS, name, part._replace(url=url))
        yield folder
        running.shutdown()


def test_fetched_where_there_is_a_network(server, tables, tmp_path):
    same(ijcnn1.load(None, tmp_path / "tfds"), tables)


def test_a_page_with_other_content_is_refused(server, tables, tmp_path):
    changed = tables["test"]._replace(inputs=tables["test"].inputs + 1e-6)
    (server / "ijcnn1.t.bz2").write_bytes(bz2.compress(text(changed)))
    assert "holds other numbers than ijcnn1" in refused(None, tmp_path / "tfds")[0]
    (server / "ijcnn1.t.bz2").unlink()
    assert "404" in refused(None, tmp_path / "tfds")[0]


def test_offline_the_error_comes_at_once_and_names_the_way_out(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "reachable", lambda url: False)
    message, seconds = refused(None, tmp_path)
    assert seconds < 1
    for part in ("ijcnn1.trn.bz2 and ijcnn1.tst.bz2", ijcnn1.PAGE, "--manual-dir"):
        assert part in message


def test_a_folder_without_the_files(tables, tmp_path):
    assert "is no folder" in refused(tmp_path / "nowhere", tmp_path)[0]
    (tmp_path / "ijcnn1.trn.bz2").write_bytes(b"")
    assert "lacks ijcnn1.trn.bz2 and ijcnn1.tst.bz2" in refused(tmp_path, tmp_path)[0]


def relabelled(table):
    return table._replace(labels=np.where(table.labels > 0, 3, -1))


def wider(table):
    return table._replace(inputs=np.hstack([table.inputs, np.ones((len(table.labels), 1))]))


def shorter(table):
    return ijcnn1.Table(table.inputs[:-1], table.labels[:-1])


def other(table):
    return table._replace(inputs=table.inputs[:, ::-1])


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda table: bz2.compress(text(table))[:-20], "cannot be read as svmlight"),
        (lambda table: b"not bzip2", "cannot be read as svmlight"),
        (lambda table: bz2.compress(b"1 a:b\n"), "cannot be read as svmlight"),
        (lambda table: bz2.compress(text(wider(table))), "cannot be read as svmlight"),
        (lambda table: bz2.compress(text(relabelled(table))), "has the label 3"),
        (lambda table: bz2.compress(text(shorter(table))), "has 4 rows of 22 features, and not 5"),
        (lambda table: bz2.compress(text(other(table))), "wrong checksum"),
    ],
    ids=["truncated", "no bzip2", "no svmlight", "a column more", "label", "row less", "numbers"],
)
def test_what_is_no_ijcnn1_is_named(spoil, expected, tables, tmp_path):
    write(tmp_path, tables, 0)
    path = tmp_path / "ijcnn1.tst.bz2"
    path.write_bytes(spoil(tables["test"]))
    message, _ = refused(tmp_path, tmp_path / "tfds")
    assert str(path) in message and expected in message
    assert not (tmp_path / "tfds").exists()


def test_the_known_files_are_checked_before_they_are_parsed(data_dir, tmp_path):
    for name in ("ijcnn1.trn.bz2", "ijcnn1.tst.bz2"):
        content = bytearray((data_dir / "ijcnn1" / name).read_bytes())
        content[1000] ^= 1
        (tmp_path / name).write_bytes(content)
    message, seconds = refused(tmp_path, tmp_path / "tfds")
    assert "ijcnn1.trn.bz2 has the wrong checksum" in message and seconds < 1


@pytest.mark.slow
def test_the_real_files(data_dir, tmp_path):
    found = ijcnn1.load(data_dir, tmp_path)
    assert found["train"].inputs.shape == (49_990, 22)
    next(tmp_path.rglob("*.npz")).unlink()
    same(ijcnn1.load(None, tmp_path), found)
