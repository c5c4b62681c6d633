"""Download of images by URL: address checks, attempts, scheduling by host, journal and manifest."""

from vila_ops.data.download.manifest import Outcomes as Outcomes
from vila_ops.data.download.manifest import key_of as key_of
from vila_ops.data.download.manifest import table as table
from vila_ops.data.download.outcome import Outcome as Outcome
from vila_ops.data.download.planned import planned as planned
from vila_ops.data.download.planned import summary as summary
from vila_ops.data.download.run import download as download
from vila_ops.data.download.run import download_source as download_source
from vila_ops.data.download.sources import url_module as url_module
from vila_ops.data.download.sources import urls_of as urls_of
