"""Formats of science: HDF5, NetCDF, Zarr, Parquet, and numpy's maps. They seek, overwrite, lock and map."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.mounted.conftest import Rig
from tests.mounted.kernel import drop_pages
from tests.mounted.programs.conftest import sized


def test_hdf5_is_created_extended_and_read_in_part(folder: Rig) -> None:
    import h5py

    path = folder.mount / "series.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("values", data=np.arange(10_000), maxshape=(None,), chunks=(1000,), compression="gzip")
        file.attrs["unit"] = "K"
    folder.daemon.sync(folder.mount)
    for start in range(10_000, 15_000, 1000):
        with h5py.File(path, "a") as file:
            file["values"].resize(start + 1000, axis=0)
            file["values"][start:] = np.arange(start, start + 1000)
            file.create_group(f"group {start}").attrs["start"] = start
    drop_pages(path)

    with h5py.File(path, "r") as file:
        assert (file["values"][12_345:12_445] == np.arange(12_345, 12_445)).all()
        assert (file["values"][...] == np.arange(15_000)).all()
        assert file.attrs["unit"] == "K"
        assert len(file) == 6


def test_hdf5_keeps_a_second_writer_out_while_the_first_has_it_open(folder: Rig) -> None:
    import h5py

    code = "import h5py, sys; h5py.File(sys.argv[1], sys.argv[2]).close()"
    path = folder.mount / "locked.h5"
    with h5py.File(path, "w") as file:
        file["x"] = [1, 2, 3]
        file.flush()
        second = subprocess.run([sys.executable, "-c", code, path, "a"], capture_output=True, text=True)
    afterwards = subprocess.run([sys.executable, "-c", code, path, "a"], capture_output=True, text=True)

    assert second.returncode != 0
    assert "unable to lock file" in second.stderr
    assert afterwards.returncode == 0, afterwards.stderr


def test_hdf5_readers_follow_a_writer(folder: Rig) -> None:
    """SWMR: one process writes, others read the same open file."""
    import h5py

    path = folder.mount / "followed.h5"
    with h5py.File(path, "w", libver="latest") as writer:
        values = writer.create_dataset("values", shape=(0,), maxshape=(None,), chunks=(100,), dtype="i8")
        writer.swmr_mode = True
        with h5py.File(path, "r", libver="latest", swmr=True) as reader:
            for count in range(100, 500, 100):
                values.resize((count,))
                values[...] = np.arange(count)
                values.flush()
                reader["values"].refresh()
                assert (reader["values"][...] == np.arange(count)).all()


def test_netcdf_is_created_appended_and_read_in_part(folder: Rig) -> None:
    netcdf = pytest.importorskip("netCDF4", reason="netCDF4 is not installed")
    path = str(folder.mount / "grid.nc")
    with netcdf.Dataset(path, "w") as data:
        data.createDimension("time", None)
        data.createDimension("x", 50)
        data.createVariable("t2m", "f4", ("time", "x"), zlib=True)[0:3, :] = np.arange(150).reshape(3, 50)
    with netcdf.Dataset(path, "a") as data:
        data["t2m"][3, :] = -1.0
        data.title = "grown"

    with netcdf.Dataset(path) as data:
        assert data.title == "grown"
        assert data["t2m"].shape == (4, 50)
        assert (data["t2m"][1, 10:20] == np.arange(60, 70)).all()


def test_zarr_arrays_are_many_small_files_and_come_back(folder: Rig) -> None:
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    values = np.arange(250_000).reshape(500, 500)
    array = zarr.open_array(str(folder.mount / "grid.zarr"), mode="w", shape=(500, 500), chunks=(100, 100), dtype="i8")
    array[...] = values
    array[100:200, 100:200] = 7
    array.attrs["unit"] = "m"

    again = zarr.open_array(str(folder.mount / "grid.zarr"), mode="r")

    values[100:200, 100:200] = 7
    assert (again[...] == values).all()
    assert again.attrs["unit"] == "m"


def test_pandas_writes_and_reads_what_it_knows(folder: Rig) -> None:
    import pandas as pd

    frame = pd.DataFrame({"name": [f"sample {n}" for n in range(1000)], "value": np.linspace(0, 1, 1000)})
    for name, write, read in (
        ("table.csv", frame.to_csv, pd.read_csv),
        ("table.csv.gz", frame.to_csv, pd.read_csv),
        ("table.json", frame.to_json, pd.read_json),
        ("table.pkl", frame.to_pickle, pd.read_pickle),
    ):
        write(folder.mount / name, **({"index": False} if "csv" in name else {}))
        pd.testing.assert_frame_equal(read(folder.mount / name), frame, check_dtype=False)


def test_a_parquet_dataset_of_many_files_is_queried(folder: Rig) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    count = sized(20, 100)
    for number in range(count):
        place = folder.mount / "dataset" / f"year={2000 + number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        table = pa.table({"n": np.arange(1000) + number * 1000, "x": np.random.default_rng(number).random(1000)})
        pq.write_table(table, place / f"part-{number}.parquet")

    found = ds.dataset(folder.mount / "dataset", partitioning="hive")

    assert found.count_rows() == 1000 * count
    assert pc.sum(found.to_table(columns=["n"])["n"]).as_py() == sum(range(1000 * count))
    assert found.to_table(filter=ds.field("n") == 5005)["year"].to_pylist() == [2005]
    assert pq.read_table(folder.mount / "dataset" / "year=2003", memory_map=True).num_rows == 100 * count


def test_a_memory_map_of_numpy_changes_the_file(folder: Rig) -> None:
    path = folder.mount / "matrix.npy"
    np.save(path, np.zeros((300, 400)))
    folder.daemon.sync(folder.mount)

    matrix = np.load(path, mmap_mode="r+")
    matrix[100:200, 50:60] = 3.5
    matrix.flush()
    del matrix

    again = np.load(path)
    assert again[100:200, 50:60].sum() == 3500
    assert again.sum() == 3500


def test_two_processes_compute_in_one_memory_map(folder: Rig) -> None:
    code = """if True:
        import sys
        import numpy as np
        shared = np.memmap(sys.argv[1], dtype="f8", mode="r+", shape=(100_000,))
        for line in sys.stdin:
            start = int(line)
            shared[start:start + 1000] *= 2
            print("done", flush=True)
    """
    path = folder.mount / "shared.dat"
    shared = np.memmap(path, dtype="f8", mode="w+", shape=(100_000,))
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        for start in range(0, 100_000, 10_000):
            shared[start : start + 2000] = start + 1
            print(start, file=other.stdin, flush=True)
            assert other.stdout.readline() == "done\n"
            assert shared[start] == 2 * (start + 1)
            assert shared[start + 1500] == start + 1
        other.stdin.close()
    shared.flush()
    expected = shared.copy()
    del shared

    assert (np.fromfile(path) == expected).all()


def test_savez_and_text_files_come_back(folder: Rig, tmp_path: Path) -> None:
    values = np.random.default_rng(1).random((50, 20))
    np.savez_compressed(folder.mount / "both.npz", a=values, b=values.T)
    np.savetxt(folder.mount / "values.txt", values)

    with np.load(folder.mount / "both.npz") as both:
        assert (both["a"] == values).all()
        assert (both["b"] == values.T).all()
    assert np.allclose(np.loadtxt(folder.mount / "values.txt"), values)
