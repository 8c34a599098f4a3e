"""Downloads datasets: those of nanochat by name, and any dataset of the Hugging Face Hub.

huggingface_hub fetches the files of the Hub: it resumes what was cut off, takes HF_ENDPOINT for a mirror and HF_TOKEN
for private datasets. nanochat's two other files come from its bucket, or from the mirror in NANOCHAT_BUCKET.

Each dataset has a folder with a list of its files, `.download.json`: their sizes and SHA-256 and the commit of the
dataset. A file counts as there if it is in the list, and it comes into the list after its bytes were checked: against
the hash that the Hub gives, or against the MD5 or the size that the bucket gives.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import hashlib
import http.client
import json
import os
import re
import shutil
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from nanochat_native.runtime.files import sha256_file, write_atomically

EXTRA = "downloads need huggingface_hub: pip install 'nanochat-native[data]'"
KEPT = "what has come is kept, run the command again"
BUCKET = "https://karpathy-public.s3.us-west-2.amazonaws.com"
LIST = ".download.json"
DATA_FILES = ("*.parquet", "*.jsonl", "*.jsonl.gz", "*.jsonl.zst")  # of a dataset without patterns of its own
ATTEMPTS, ATTEMPTS_TO_ASK = 6, 3  # for files, and for the list of them
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between attempts; each is twice as long as the one before
TIMEOUT = 30.0  # seconds without a byte
SPARE_BYTES = 1 << 28  # that stay free on the disk
_CHUNK = 1 << 20
_NOT_THAT_RANGE = 416
_TOO_BUSY = (408, 429, 500, 502, 503, 504)

T = TypeVar("T")


@dataclass
class Options:
    """Download datasets: nanochat's by name, and any dataset of the Hugging Face Hub as owner/name.

    Without a name, list the names and what is there. Each dataset gets a folder in --out. HF_ENDPOINT sets a
    mirror of the Hub, HF_TOKEN the token for private datasets.
    """

    datasets: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of datasets."""
    out: Path = Path("data")
    """Folder for the datasets."""
    shards: int | None = None
    """Download only the first files of each dataset; of climbmix also the last one, which is for validation."""
    files: tuple[str, ...] = ()
    """Patterns of the files to download, such as 'data/train-*.parquet'; default: those of the dataset."""
    offline: bool = False
    """Use no network: check that the files that were downloaded are there with the right bytes."""
    yes: bool = False
    """Download without asking."""


@dataclass(frozen=True)
class Dataset:
    """A dataset that has a name.

    Attributes:
        name: also of its folder.
        repo: the dataset of the Hub, owner/name; or the file of nanochat's bucket.
        patterns: of the files that are downloaded.
        about: what it is for.
        last_validates: whether the files are numbered shards, of which the last one is for validation.
    """

    name: str
    repo: str
    patterns: tuple[str, ...]
    about: str
    last_validates: bool = False

    @property
    def in_bucket(self) -> bool:
        return "/" not in self.repo


DATASETS = (
    Dataset(
        "climbmix",
        "karpathy/climbmix-400b-shuffle",
        ("shard_*.parquet",),
        "nanochat's text for pretraining, 6,543 shards",
        last_validates=True,
    ),
    Dataset("smoltalk", "HuggingFaceTB/smol-smoltalk", ("data/*.parquet",), "460,000 conversations"),
    Dataset("mmlu", "cais/mmlu", ("all/*.parquet",), "multiple choice on 57 subjects"),
    Dataset("gsm8k", "openai/gsm8k", ("main/*.parquet",), "word problems with calculations"),
    Dataset("arc", "allenai/ai2_arc", ("ARC-*/*.parquet",), "multiple choice on science"),
    Dataset("humaneval", "openai/openai_humaneval", ("openai_humaneval/*.parquet",), "164 programming problems"),
    Dataset("identity", "identity_conversations.jsonl", ("*",), "conversations about nanochat itself"),
    Dataset("eval-bundle", "eval_bundle.zip", ("*",), "the data of the CORE score"),
)


def find_dataset(name: str) -> Dataset:
    """Return the dataset of a name, or the one of the Hub with this owner/name. Raises ValueError for other names."""
    for dataset in DATASETS:
        if name == dataset.name:
            return dataset
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII):
        return Dataset(name.replace("/", "--"), name, DATA_FILES, "a dataset of the Hugging Face Hub")
    known = ", ".join(dataset.name for dataset in DATASETS)
    raise ValueError(f"a dataset must be one of {known}, or owner/name of the Hugging Face Hub, got {name!r}")


@dataclass(frozen=True)
class File:
    """A file of a dataset.

    Attributes:
        path: in the dataset's folder.
        size: in bytes.
        hash: SHA-256 for a large file of the Hub, the hash of git for a small one, MD5 of the bucket; "" for none.
    """

    path: str
    size: int
    hash: str


@dataclass(frozen=True)
class Plan:
    """The files of a dataset that were asked for.

    Attributes:
        revision: the commit of the Hub; "" for the bucket.
        missing: those of the files that are not there yet.
    """

    dataset: Dataset
    folder: Path
    revision: str
    files: tuple[File, ...]
    missing: tuple[File, ...]

    @property
    def missing_bytes(self) -> int:
        return sum(file.size for file in self.missing)


def read_list(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what is in a dataset's folder: for each path its size, SHA-256, and hash as in File.

    A file that has another size than in the list, or that is gone, is left out.
    """
    try:
        files = json.loads((folder / LIST).read_text())["files"]
        return {path: entry for path, entry in files.items() if _size(folder / path) == entry["size"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def make_plan(
    dataset: Dataset,
    out: Path,
    say: Callable[[str], None],
    *,
    patterns: Sequence[str] = (),
    shards: int | None = None,
) -> Plan:
    """Return what there is to download of a dataset to a folder of its name in `out`. Asks the server.

    Args:
        say: called with each note to the user.
        patterns: of the files, instead of the dataset's own.
        shards: only the first so many shards, and the one for validation.

    Raises:
        ValueError: no file fits; the dataset does not exist, needs a token, or has a file outside of its folder.
        OSError: the server cannot be reached.
        ImportError: huggingface_hub is not installed.
    """
    folder = out / dataset.name
    ask = functools.partial(_bucket_files if dataset.in_bucket else _hub_files, dataset)
    revision, found = _attempts(ask, say, attempts=ATTEMPTS_TO_ASK)
    wanted = tuple(patterns) or dataset.patterns
    files = [file for file in found if any(fnmatch.fnmatchcase(file.path, pattern) for pattern in wanted)]
    if not files:
        raise ValueError(f"{dataset.repo} has no file that fits {' '.join(wanted)}")
    files.sort(key=lambda file: file.path)
    for file in files:
        if not (folder / file.path).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{dataset.repo} has a file that is outside of its folder, {file.path!r}")
    if shards is not None and dataset.last_validates and not patterns:
        files = files[:shards] + files[-1:] if shards < len(files) else files
    elif shards is not None:
        files = files[:shards]
    there = read_list(folder)
    missing = [file for file in files if not _is_there(folder, file, there.get(file.path, {}))]
    return Plan(dataset, folder, revision, tuple(files), tuple(missing))


def _is_there(folder: Path, file: File, entry: dict[str, Any]) -> bool:
    """Return whether a file is in the list as the server has it now, and an archive is unpacked."""
    unpacked = not file.path.endswith(".zip") or (folder / file.path).with_suffix("").is_dir()
    return unpacked and (entry.get("size"), entry.get("hash")) == (file.size, file.hash)


def check_space(plans: Sequence[Plan]) -> None:
    """Raise ValueError if the disk has no room for what is missing."""
    needed = sum(plan.missing_bytes for plan in plans)
    folder = plans[0].folder
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed and needed + SPARE_BYTES > free:
        raise ValueError(f"{folder} has {in_units(free)} free, but the files need {in_units(needed)}")


def download(plan: Plan, say: Callable[[str], None]) -> None:
    """Download what is missing, check it, and write it into the list of the folder.

    Args:
        say: called with each note to the user.

    Raises:
        ValueError: a file has other bytes than the server announced. It has been removed.
        OSError: the server or the disk fails. What has come so far is kept, and the next call resumes it.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    if plan.dataset.in_bucket:
        for file in plan.missing:
            _attempts(functools.partial(_fetch, plan.folder / file.path, file), say)
            _check(plan, file)
            if file.path.endswith(".zip"):
                _unpack(plan.folder / file.path)
        _add_to_list(plan, plan.missing)
        return
    # A part of the files at a time, so that an end in the middle keeps what was checked. The shard for validation,
    # the last one, comes first: a training that starts before the others are there then holds out the right one.
    missing = plan.missing
    first = int(plan.dataset.last_validates and missing[-1:] == plan.files[-1:])
    missing = missing[len(missing) - first :] + missing[: len(missing) - first]
    for part in filter(None, (missing[:first], *(missing[i : i + 8] for i in range(first, len(missing), 8)))):
        _attempts(functools.partial(_fetch_from_hub, plan, part), say)
        for file in part:
            _check(plan, file)
        _add_to_list(plan, part)


def verify(dataset: Dataset, out: Path) -> list[str]:
    """Return the paths of a dataset that are in its list but not there with the same bytes, without a network.

    Raises ValueError if the dataset was never downloaded.
    """
    folder = out / dataset.name
    name = dataset.name if dataset in DATASETS else dataset.repo
    try:
        files = {path: entry["sha256"] for path, entry in json.loads((folder / LIST).read_text())["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder} has no list of downloaded files: run download {name} once") from None
    there = read_list(folder)
    return [path for path, digest in files.items() if path not in there or sha256_file(folder / path) != digest]


def in_units(size: float) -> str:
    """Return a number of bytes for people, such as 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


# --- checks ---


def _check(plan: Plan, file: File) -> None:
    path = plan.folder / file.path
    size = _size(path)
    if size != file.size or not _has_hash(path, file.hash):
        path.unlink(missing_ok=True)
        raise ValueError(
            f"{path} came with other bytes than {plan.dataset.repo} announced ({size:,} of {file.size:,} bytes); "
            "it was removed, run the command again"
        )


def _add_to_list(plan: Plan, checked: Sequence[File]) -> None:
    files = read_list(plan.folder)
    for file in checked:
        digest = file.hash if len(file.hash) == 64 else sha256_file(plan.folder / file.path)
        files[file.path] = asdict(file) | {"sha256": digest}
    content = {"dataset": plan.dataset.repo, "revision": plan.revision, "files": dict(sorted(files.items()))}
    write_atomically(plan.folder / LIST, json.dumps(content, indent=1) + "\n")


def _has_hash(path: Path, expected: str) -> bool:
    """Return whether a file has a hash; its length tells which: SHA-256, SHA-1 of git, MD5, or none."""
    if len(expected) == 64:
        return sha256_file(path) == expected
    if len(expected) == 40:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    elif len(expected) == 32:
        digest = hashlib.md5(usedforsecurity=False)
    else:
        return True
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == expected


def _attempts(work: Callable[[], T], say: Callable[[str], None], attempts: int = ATTEMPTS) -> T:
    """Do the work, again after a while if the server is too busy or the connection breaks."""
    wait = FIRST_WAIT
    for _ in range(attempts - 1):
        try:
            return work()
        except _AgainError as error:
            seconds = min(LONGEST_WAIT, max(wait, error.seconds))
            say(f"note     {error}; trying again in {seconds:.0f} s")
            time.sleep(seconds)
            wait *= 2
    try:
        return work()
    except _AgainError as error:
        raise OSError(f"{error}, {attempts} times; {KEPT}") from None


class _AgainError(Exception):
    """An error that may pass; seconds: how long the server asks to wait."""

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


def _retry_after(headers: Any) -> float:
    value = str(headers.get("Retry-After") or "")
    return float(value) if value.isascii() and value.isdigit() and len(value) < 6 else 0.0


# --- the Hub ---


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(f"{EXTRA} ({error})") from None
    return huggingface_hub


def _hub_files(dataset: Dataset) -> tuple[str, list[File]]:
    """Return the commit of a dataset, and its files."""

    with _HubErrors(dataset.repo):
        api = _hub().HfApi()
        revision = str(api.dataset_info(dataset.repo, timeout=TIMEOUT).sha)
        tree = api.list_repo_tree(dataset.repo, recursive=True, revision=revision, repo_type="dataset")
        entries = [entry for entry in tree if hasattr(entry, "blob_id")]
    return revision, [
        File(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id) for entry in entries
    ]


def _fetch_from_hub(plan: Plan, files: Sequence[File]) -> None:
    with _HubErrors(plan.dataset.repo):
        _hub().snapshot_download(
            plan.dataset.repo,
            repo_type="dataset",
            revision=plan.revision,
            local_dir=plan.folder,
            allow_patterns=[_literal(file.path) for file in files],
        )
    # Where the server fails, snapshot_download may return the folder as it is, with older files.
    absent = [file.path for file in files if _size(plan.folder / file.path) != file.size]
    if absent:
        raise _AgainError(f"{plan.dataset.repo}: {absent[0]} did not come")


def _literal(path: str) -> str:
    """Return the pattern that fits only this path."""
    return re.sub(r"([*?[])", r"[\1]", path)


class _HubErrors:
    """Turns the errors of huggingface_hub into those of this module."""

    def __init__(self, repo: str) -> None:
        self._repo = repo

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, _AgainError | ImportError):
            return
        errors = _hub().errors
        if isinstance(error, errors.GatedRepoError):
            raise ValueError(f"{self._repo} must be unlocked on its page of the Hub, and needs HF_TOKEN") from None
        if isinstance(error, errors.RepositoryNotFoundError):
            raise ValueError(f"{self._repo} does not exist on the Hub, or is private and needs HF_TOKEN") from None
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(error.filename or self._repo)) from None
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if response is not None and status in _TOO_BUSY:
            raise _AgainError(f"{self._repo}: the server answers {status}", _retry_after(response.headers)) from None
        if response is not None and status is not None:
            path = urllib.parse.unquote(str(response.url).partition("/resolve/")[2].partition("/")[2])
            raise OSError(f"{self._repo}{path and ': ' + path}: the server answers {status}") from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        of_this_machine = isinstance(error, OSError) and error.filename is not None
        if of_this_machine or isinstance(error, errors.OfflineModeIsEnabled):
            raise OSError(f"{self._repo}: {reason}; {KEPT}") from None
        transport = type(error).__module__.startswith(("http", "hf_xet")) or isinstance(error, RuntimeError)
        if transport or isinstance(error, OSError | errors.LocalEntryNotFoundError):
            raise _AgainError(f"{self._repo}: {reason}") from None


# --- nanochat's bucket ---


def _bucket_url(name: str) -> str:
    return f"{os.environ.get('NANOCHAT_BUCKET') or BUCKET}/{name}"


def _open(url: str, headers: dict[str, str], method: str = "GET") -> Any:
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", **headers}, method=method)
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code in _TOO_BUSY or error.code == _NOT_THAT_RANGE:
            raise _AgainError(f"{url}: the server answers {error.code}", _retry_after(error.headers)) from error
        raise OSError(f"{url}: the server answers {error.code}") from None
    except (ValueError, http.client.InvalidURL) as error:
        raise ValueError(f"{url} is no address of a server: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _AgainError(f"{url}: {getattr(error, 'reason', error) or type(error).__name__}") from None


def _bucket_files(dataset: Dataset) -> tuple[str, list[File]]:
    with _open(_bucket_url(dataset.repo), {}, "HEAD") as answer:
        tag = str(answer.headers.get("ETag") or "").strip('"')
        size = str(answer.headers.get("Content-Length") or "")
    if not (size.isascii() and size.isdigit()):
        raise OSError(f"{_bucket_url(dataset.repo)}: the server does not tell the size")
    # The tag of a file that was uploaded in one part is its MD5.
    return "", [File(dataset.repo, int(size), tag if re.fullmatch("[0-9a-f]{32}", tag) else "")]


def _fetch(path: Path, file: File) -> None:
    """Download a file of the bucket from where an earlier attempt ended."""
    part = path.with_name(f".{path.name}.part")
    have = max(0, _size(part))
    if have > file.size:
        part.unlink()
        have = 0
    if have < file.size:
        headers = {"Range": f"bytes={have}-"} if have else {}
        if have and file.hash:
            headers["If-Range"] = f'"{file.hash}"'
        try:
            opened = _open(_bucket_url(file.path), headers)
        except _AgainError as error:
            if isinstance(error.__cause__, urllib.error.HTTPError) and error.__cause__.code == _NOT_THAT_RANGE:
                part.unlink(missing_ok=True)  # the server's file has become shorter
            raise
        with opened as answer, open(part, "ab" if have else "wb") as target:
            if have and answer.status != 206:  # the whole file comes
                target.truncate(0)
            while True:
                try:
                    chunk = answer.read(_CHUNK)
                except Exception as error:  # http.client's and OSError alike: the connection is gone
                    raise _AgainError(f"{_bucket_url(file.path)}: {error or type(error).__name__}") from None
                if not chunk:
                    break
                target.write(chunk)
    if _size(part) < file.size:
        raise _AgainError(f"{_bucket_url(file.path)}: the connection ended after {_size(part):,} bytes")
    os.replace(part, path)


def _unpack(archive: Path) -> None:
    """Unpack an archive beside it; what it had unpacked before is replaced."""
    target = archive.with_suffix("")
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=".unpack-") as folder:
        try:
            with zipfile.ZipFile(archive) as opened:
                needed = sum(entry.file_size for entry in opened.infolist())
                free = shutil.disk_usage(folder).free
                if needed + SPARE_BYTES > free:
                    raise OSError(f"{archive} needs {in_units(needed)} unpacked, but {in_units(free)} are free")
                unpacked = Path(folder) / "new"
                unpacked.mkdir()
                opened.extractall(unpacked)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise ValueError(f"{archive} is no zip archive that can be read: {error}") from None
        top = unpacked / archive.stem
        if os.path.lexists(target):
            os.replace(target, Path(folder) / "old")
        os.replace(top if top.is_dir() else unpacked, target)  # whole or not at all
