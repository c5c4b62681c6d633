"""Fetch the images of raw files by URL: resumable, rate-limited, and safe against malicious URLs and servers."""

import asyncio
import hashlib
import logging
import random
import resource
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from vila_ops.config import Source
from vila_ops.config.download import DownloadSettings
from vila_ops.data.download.address import Resolve, SystemResolver, parse
from vila_ops.data.download.fetch import Attempt, Fetcher
from vila_ops.data.download.journal import Journal
from vila_ops.data.download.manifest import (
    Outcomes,
    check_ours,
    manifest_path,
    read_outcomes,
    reopen,
    unfinished,
    upload,
    write_manifest,
)
from vila_ops.data.download.outcome import HOST_FAILS, MAY_PASS, DownloadRecord, Failure, Outcome
from vila_ops.data.download.schedule import FetchJob, HostSchedule
from vila_ops.data.download.sources import raw_files, urls_of
from vila_ops.data.raw.objects import ObjectPath

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0
OTHER_OPEN_FILES = 100


def download_source(
    source: Source, out: Path, *, settings: DownloadSettings, cache: Path, retry: Collection[Outcome] = ()
) -> list[Outcomes]:
    """Fetch the images that a source may use into `out`: NAME.tar and NAME.parquet for each raw file.

    Where `out` is in an object store, the images of one raw file at a time lie in `cache` until all of them are there.
    After an interruption it continues where it stopped. Finished URLs are not requested again, except for those that
    ended in one of the `retry` outcomes. Raises ValueError for raw files of another format, and OSError if the disk is
    full. A file in `out` that no download wrote is refused before any request.
    """
    resolve = SystemResolver()
    finished = []
    for file, target in checked_files(source, out):
        urls = urls_of(source, file)
        work = work_of(target, cache)
        finished.append(asyncio.run(download(urls, target, settings=settings, resolve=resolve, retry=retry, work=work)))
        logger.info("%s: %s", file.name, finished[-1].counts)
    return finished


def checked_files(source: Source, out: Path) -> list[tuple[Path, Path]]:
    """Each raw file and the path of its results without suffixes. Raises ValueError for what would be overwritten."""
    if (
        not isinstance(out, ObjectPath)
        and not next(parent for parent in (out, *out.parents) if parent.exists()).is_dir()
    ):
        raise ValueError(f"{out} cannot be a folder, because it or a parent is a file; name another folder")
    raw = raw_files(source, out)
    for _, target in raw:
        check_ours(target)
    return raw


async def download(
    urls: Sequence[str],
    out: Path,
    *,
    settings: DownloadSettings,
    resolve: Resolve | None = None,
    retry: Collection[Outcome] = (),
    work: Path | None = None,
) -> Outcomes:
    """Fetch the images of one raw file; `out` is the path of the results without suffixes. URLs are deduplicated.

    `work` is such a path on this machine for what is unfinished; None: `out` itself, which then is on this machine too.
    URLs that an earlier call fetched keep their outcomes, unless it is one of `retry`; only others are requested.
    `resolve` replaces the system resolver. Raises ValueError if `out` is in use.
    """
    _check_open_files(settings)
    distinct = list(dict.fromkeys(urls))
    work = work or out
    work.parent.mkdir(parents=True, exist_ok=True)
    with Journal(work) as journal:
        if manifest_path(out).exists() and unfinished(distinct, out, retry=retry):
            reopen(journal, out, retry=retry)
        if not manifest_path(out).exists():
            async with Fetcher(settings, resolve=resolve or SystemResolver()) as fetcher:
                await _Run(distinct, journal, fetcher, settings).run()
            others = sorted(journal.records.keys() - set(distinct))  # of an earlier raw file, or of a larger selection
            write_manifest(journal, [*distinct, *others], work)
            if isinstance(out, ObjectPath):
                upload(work, out)
        outcomes = read_outcomes(distinct, out)
        journal.remove()
    return outcomes


def work_of(out: Path, cache: Path) -> Path | None:
    """Where on this machine the unfinished images of a raw file lie; None for a place of this machine."""
    if not isinstance(out, ObjectPath):
        return None
    return cache / "downloads" / hashlib.sha256(str(out).encode()).hexdigest()[:24] / out.name


def _check_open_files(settings: DownloadSettings) -> None:
    """Raise ValueError if the limit of open files is too low, which would be recorded as failures of the servers."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed < settings.concurrency + OTHER_OPEN_FILES:
        raise ValueError(
            f"concurrency {settings.concurrency} needs {settings.concurrency + OTHER_OPEN_FILES} open files and "
            f"`ulimit -n` is {allowed}; raise that or lower concurrency"
        )


class _Run:
    """Fetches the URLs of one raw file into its journal."""

    def __init__(self, urls: Sequence[str], journal: Journal, fetcher: Fetcher, settings: DownloadSettings) -> None:
        self._urls = urls
        self._journal = journal
        self._fetcher = fetcher
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._failures: Counter[bytes] = Counter()
        self._reported = 0.0

    async def run(self) -> None:
        """Request URLs until every URL has its record."""
        schedule = HostSchedule(
            await self._jobs(),
            per_host=self._settings.per_host_concurrency,
            per_second=self._settings.per_host_per_second,
        )
        try:
            async with asyncio.TaskGroup() as group:
                await self._slots.acquire()
                while (job := await schedule.next()) is not None:
                    group.create_task(self._fetch(job, schedule))
                    await self._slots.acquire()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors

    async def _jobs(self) -> list[FetchJob]:
        """The URLs to request: those without a record. URLs that are refused without a request are recorded here."""
        jobs, refused = [], []
        for url in self._urls:
            if url in self._journal.records:
                continue
            try:
                jobs.append(FetchJob(url, host=parse(url, ports=self._settings.ports).raw_host))
            except Failure as failure:
                attempt = Attempt(final_url=url, outcome=failure.outcome, detail=failure.detail)
                refused.append((_record(url, attempt, attempts=0), b""))
        await asyncio.to_thread(self._journal.write, refused)
        return jobs

    async def _fetch(self, job: FetchJob, schedule: HostSchedule) -> None:
        try:
            if self._failures[job.host] >= self._settings.host_failures:
                detail = f"the host failed {self._settings.host_failures} times in a row"
                attempt = Attempt(final_url=job.url, outcome="host_given_up", detail=detail)
                job.attempts -= 1
            else:
                attempt = await self._fetcher.attempt(job.url)
                self._failures[job.host] = self._failures[job.host] + 1 if attempt.outcome in HOST_FAILS else 0
            if attempt.outcome in MAY_PASS and job.attempts < self._settings.attempts:
                schedule.again(
                    job,
                    seconds=self._wait_seconds(job, attempt),
                    pause_host=attempt.outcome == "rate_limited" or attempt.retry_after_seconds is not None,
                )
                return
            await self._journal.add(_record(job.url, attempt, attempts=job.attempts), attempt.body)
            schedule.done(job)
            self._report()
        finally:
            self._slots.release()

    def _wait_seconds(self, job: FetchJob, attempt: Attempt) -> float:
        """Exponential backoff with full jitter, and at least what the server asks for, up to the cap."""
        limit = self._settings.max_wait_seconds
        backoff = random.uniform(0, min(limit, self._settings.backoff_seconds * 2 ** (job.attempts - 1)))
        return max(backoff, min(limit, attempt.retry_after_seconds or 0.0))

    def _report(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._reported >= PROGRESS_SECONDS:
            self._reported = now
            logger.info("%d of %d URLs done", len(self._journal.records), len(self._urls))


def _record(url: str, attempt: Attempt, *, attempts: int) -> DownloadRecord:
    is_image = attempt.outcome == "ok"
    return DownloadRecord(
        url=url,
        outcome=attempt.outcome,
        detail=attempt.detail,
        http_status=attempt.http_status,
        attempts=attempts,
        final_url=attempt.final_url,
        extension=attempt.extension,
        bytes=len(attempt.body) if is_image else None,
        sha256=hashlib.sha256(attempt.body).hexdigest() if is_image else None,
    )
