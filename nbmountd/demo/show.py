"""What the demo shows, step by step, on a mounted remote; each step ends in a check that counts.

It uses the mount as any program would, and the server's directory to see what really arrived.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import h5py
import nbformat
import pandas
from rich.console import Console
from rich.filesize import decimal

from nbmountd.demo.further import Further, further_remotes
from nbmountd.demo.samples import LARGE_FILE, MIB, SMALL_FILES, make_samples, notebook
from nbmountd.demo.stage import NAME, Stage, program


class Show:
    """One run of the demo on `stage`."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._console = Console(highlight=False)
        self._failed = 0
        self._written: dict[str, str] = {}
        """Digests of what was written through the mount, by path; the server must end up with the same."""

    def run(self, *, keep: bool) -> int:
        """Shows everything; returns the exit status."""
        stage = self._stage
        self._step("A remote: a WebDAV server of its own, with a data set made just now")
        url = stage.start_server()
        make_samples(stage.remote)
        originals = digests(stage.remote)
        self._say(f"{url} serves {len(originals)} files, {decimal(total_size(stage.remote))}")

        further = further_remotes()
        if not further:
            self._say("Stand-ins for D4Science and the like come with the source tree only; they are left out.")
        self._step(f"nbmountd run: the remote becomes the directory {stage.mount}")
        with self._timed("live"):
            stage.start_daemon(url, {each.name: each.start(stage) for each in further})
        self._list()
        self._read()
        self._write()
        self._save_notebook()

        self._step("Is it safe? nbmountctl status, queue, sync")
        times = {path: path.stat().st_mtime_ns for path in files_below(stage.mount)}
        self._command("status")
        stage.ctl("status")
        self._command("queue")
        self._first_lines(stage.ctl_output("queue"), 8)
        self._command("sync")
        self._check("sync waited until the server had everything", stage.ctl("sync") == 0)
        status = stage.status()
        self._check("nothing is unsent", (status.unsent_files, status.parked, status.conflicts) == (0, 0, 0))
        moved = [path.name for path, mtime in times.items() if path.stat().st_mtime_ns != mtime]
        self._check("no file's time moved by being uploaded", not moved, ", ".join(moved[:3]))

        self._step("On the server's own disk, byte by byte (sha256)")
        arrived = digests(stage.remote)
        expected = {**originals, **self._written}
        wrong = sorted(name for name in arrived.keys() | expected.keys() if arrived.get(name) != expected.get(name))
        self._check(f"{len(expected)} files are there, each with the right bytes", not wrong, ", ".join(wrong[:5]))

        for each in further:
            self._step(each.title)
            each.show(stage, stage.mount.with_name(each.name), self._check)

        if keep and not self._failed:
            return self._leave_running()
        self._step("Stop")
        with self._timed("stopped"):
            ended = stage.stop_daemon()
        self._check("nbmountd drained, unmounted and ended", ended == 0 and not stage.mounts(), f"status {ended}")
        return self._end(len(expected), further)

    # --- the steps -----------------------------------------------------------------------------------------------------

    def _list(self) -> None:
        with self._timed("ls -l of all folders"):
            names = {entry.name: entry.stat().st_size for entry in os.scandir(self._stage.mount)}
            small = sum(entry.stat().st_size > 0 for entry in os.scandir(self._stage.mount / "small"))
        for name, size in sorted(names.items()):
            self._say(f"  {name:<16} {'folder' if name == 'small' else decimal(size):>10}")
        self._check("every file is listed", small == SMALL_FILES and names.get("large.bin") == LARGE_FILE)

    def _read(self) -> None:
        self._step("Programs read: pandas, h5py, a slice of a large file")
        mount = self._stage.mount
        with self._timed("pandas.read_csv('stations.csv')"):
            table = pandas.read_csv(mount / "stations.csv")
        means = table.groupby("station").temperature.mean()
        self._check(f"{len(table)} rows; mean of S00 is {means['S00']:.2f} °C", len(table) == 10 * 365 * 24)
        before = self._stage.status().bytes_received
        with self._timed("one day out of field.h5 with h5py"), h5py.File(mount / "field.h5") as file:
            day = file["temperature"][200]
            whole = file["temperature"].nbytes
        fetched = self._stage.status().bytes_received - before
        self._check(f"{day.shape}: {decimal(fetched)} fetched of {decimal(whole)}", fetched < whole)
        before = self._stage.status().bytes_received
        with self._timed("1 MiB in the middle of large.bin"), (mount / "large.bin").open("rb", buffering=0) as file:
            middle = os.pread(file.fileno(), MIB, LARGE_FILE // 2)
        fetched = self._stage.status().bytes_received - before
        with (self._stage.remote / "large.bin").open("rb") as file:
            right = os.pread(file.fileno(), MIB, LARGE_FILE // 2) == middle
        self._check(f"{decimal(fetched)} fetched of {decimal(LARGE_FILE)}", right and fetched <= 2 * MIB)

    def _write(self) -> None:
        self._step("Programs write: results, a copied folder, 4 KiB into the large file; no write waits for the server")
        mount = self._stage.mount
        (mount / "results").mkdir()
        means = pandas.read_csv(mount / "stations.csv").groupby("station").temperature.mean()
        with self._timed("means.csv and a new HDF5 file"):
            means.to_csv(mount / "results" / "means.csv")
            with h5py.File(mount / "results" / "means.h5", "w") as file:
                file["means"] = means.to_numpy()
        with self._timed("a copy of 100 small files"):
            shutil.copytree(mount / "small", mount / "results" / "first", ignore=lambda _, names: sorted(names)[100:])
        with self._timed("4 KiB into large.bin"), (mount / "large.bin").open("r+b", buffering=0) as file:
            os.pwrite(file.fileno(), b"nbmountd" * 512, LARGE_FILE // 3)
        self._note("large.bin", *(str(path.relative_to(mount)) for path in files_below(mount / "results")))
        with h5py.File(mount / "results" / "means.h5") as file:
            same = (file["means"][:] == means.to_numpy()).all()
        self._check("what was written reads back", bool(same) and len(means) == 10)

    def _save_notebook(self) -> None:
        self._step("A notebook is saved the way Jupyter does it")
        mount = self._stage.mount
        path = mount / "analysis.ipynb"
        opened = nbformat.read(path, as_version=4)
        with self._timed("copy aside, truncate, write, fsync, remove the copy"):
            save_like_jupyter(path, nbformat.writes(notebook("Temperatures of ten stations, with results")).encode())
        self._note("analysis.ipynb")
        title = nbformat.read(path, as_version=4).cells[0].source
        self._check("it opens with the new title", title != opened.cells[0].source, title)

    def _leave_running(self) -> int:
        stage = self._stage
        stage.keep()
        ctl = f"XDG_RUNTIME_DIR={shlex.quote(str(stage.runtime))} {shlex.join(program('nbmountctl'))}"
        stop = f"{shlex.join(program('nbmountd'))} demo --stop --directory {shlex.quote(str(stage.home))}"
        self._step("Left running, as asked")
        self._console.print(
            f"  look around        cd {shlex.quote(str(stage.mount))}\n"
            f"  the server's disk  ls {shlex.quote(str(stage.remote))}\n"
            f"  ask the daemon     {ctl} status      (or queue, sync, explain PATH, ...)\n"
            f"  its log            {stage.log}\n"
            f"  stop it            {stop}      (or make demo STOP=1)",
            soft_wrap=True,
        )
        return 0

    def _end(self, files: int, further: Sequence[Further]) -> int:
        self._console.rule(style="dim")
        if self._failed:
            self._console.print(f"[red]{self._failed} check(s) failed; the daemon's log:[/]")
            self._console.print(self._stage.log.read_text(errors="replace")[-5000:], markup=False)
            return 1
        self._console.print(
            f"A WebDAV server was an ordinary directory ({NAME}): pandas, h5py and a notebook's save worked on it unchanged"
            + "".join(f", and so was {each.what} ({each.name})" for each in further)
            + ".\n"
            "Reading fetched what was asked for, writing returned at once, and status, queue and sync told when it was safe.\n"
            f"All {files} files were on the server byte by byte, no file's time had moved, and nothing was left behind.",
            soft_wrap=True,
        )
        return 0

    # --- saying and checking -------------------------------------------------------------------------------------------

    def _step(self, text: str) -> None:
        self._console.print(f"\n[bold]{text}[/]", soft_wrap=True)

    def _say(self, text: str) -> None:
        self._console.print(f"  {text}", soft_wrap=True)

    def _check(self, text: str, held: bool, details: str = "") -> None:
        self._failed += not held
        sign = "[green]✓[/]" if held else "[red]✗[/]"
        self._console.print(f"  {sign} {text}" + (f" ({details})" if details else ""), soft_wrap=True)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._say(f"[dim]{what}: {(time.perf_counter() - started) * 1000:.0f} ms[/]")

    def _command(self, verb: str) -> None:
        self._say(f"[cyan]$ nbmountctl {verb}[/]")

    def _first_lines(self, text: str, count: int) -> None:
        lines = text.splitlines()
        for line in lines[:count]:
            self._console.print(line, markup=False, soft_wrap=True)
        if len(lines) > count:
            self._console.print(f"... and {len(lines) - count} more")

    def _note(self, *names: str) -> None:
        self._written.update((name, digest(self._stage.mount / name)) for name in names)


def save_like_jupyter(path: Path, content: bytes) -> None:
    """What jupyter_server's `atomic_writing` does to an existing file (its services/contents/fileio.py)."""
    aside = path.with_name(f".~{path.name}")
    shutil.copy2(path, aside)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.unlink()


def files_below(directory: Path) -> list[Path]:
    """All files below `directory`, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def digest(path: Path) -> str:
    """The sha256 of a file."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(MIB):
            sha.update(block)
    return sha.hexdigest()


def digests(directory: Path) -> dict[str, str]:
    """The sha256 of each file below `directory`, by relative path."""
    return {str(path.relative_to(directory)): digest(path) for path in files_below(directory)}


def total_size(directory: Path) -> int:
    """Bytes of all files below `directory`."""
    return sum(path.stat().st_size for path in files_below(directory))
