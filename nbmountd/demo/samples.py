"""The data set of the demo: what a scientist's folder holds, made on the spot, the same in every run.

It knows only the directory it is to fill.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import h5py
import nbformat
import numpy
import pandas

MIB = 2**20
SMALL_FILES = 1000
LARGE_FILE = 200 * MIB


def make_samples(directory: Path) -> None:
    """Fills `directory`: a notebook, a CSV, an HDF5 file, a picture, 1,000 small files and one of 200 MiB."""
    random = numpy.random.default_rng(2026)
    (directory / "analysis.ipynb").write_text(nbformat.writes(notebook("Temperatures of ten stations")))
    stations(random).to_csv(directory / "stations.csv", index=False)
    with h5py.File(directory / "field.h5", "w") as file:
        file.create_dataset("temperature", data=random.normal(15, 8, (365, 180, 90)).astype("f4"))
    (directory / "picture.png").write_bytes(png(320, 200))
    (directory / "small").mkdir()
    for number in range(SMALL_FILES):
        (directory / "small" / f"reading-{number:04}.json").write_text(f'{{"reading": {number}}}\n')
    with (directory / "large.bin").open("wb") as file:
        for _ in range(LARGE_FILE // (8 * MIB)):
            file.write(random.bytes(8 * MIB))


def notebook_text(title: str) -> str:
    """A notebook as it is in its file."""
    return str(nbformat.writes(notebook(title)))


def notebook(title: str) -> nbformat.NotebookNode:
    """A notebook with `title` and a cell that reads the CSV."""
    code = "import pandas\npandas.read_csv('stations.csv').groupby('station').temperature.mean()"
    return nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell(f"# {title}", id="title"),
            nbformat.v4.new_code_cell(code, id="means"),
        ]
    )


def stations(random: numpy.random.Generator) -> pandas.DataFrame:
    """Ten stations with a year of hourly temperatures."""
    hours = numpy.arange(365 * 24)
    season = 15 - 10 * numpy.cos(2 * math.pi * hours / len(hours))
    return pandas.concat(
        pandas.DataFrame(
            {"station": f"S{number:02}", "hour": hours, "temperature": (season + random.normal(0, 2, len(hours))).round(2)}
        )
        for number in range(10)
    )


def png(width: int, height: int) -> bytes:
    """A picture of interfering waves, 8 bit RGB (PNG specification, third edition, sections 5 and 11.2)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = bytearray()
    for y in range(height):
        rows.append(0)  # filter type "none"
        for x in range(width):
            wave = math.sin(math.hypot(x - 80, y - 100) / 9) + math.sin(math.hypot(x - 240, y - 100) / 9)
            level = int((wave + 2) * 63)
            rows += bytes((level, 90, 255 - level))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(rows))) + chunk(b"IEND", b"")
