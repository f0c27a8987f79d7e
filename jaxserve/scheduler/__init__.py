"""Which tokens the next step computes, and in which pages: host code that never imports JAX."""

from jaxserve.scheduler.batch import IN_FLIGHT as IN_FLIGHT
from jaxserve.scheduler.batch import ScheduledBatch as ScheduledBatch
from jaxserve.scheduler.batch import ScheduledRow as ScheduledRow
from jaxserve.scheduler.config import KVGroupPages as KVGroupPages
from jaxserve.scheduler.config import SchedulerConfig as SchedulerConfig
from jaxserve.scheduler.page_watchers import PageWatcher as PageWatcher
from jaxserve.scheduler.page_watchers import PageWatchers as PageWatchers
from jaxserve.scheduler.sample import Sample as Sample
from jaxserve.scheduler.sample import SampleState as SampleState
from jaxserve.scheduler.scheduler import Scheduler as Scheduler
