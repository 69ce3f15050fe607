"""Where the results of `rewire bench` are kept: SQLite by default, PostgreSQL for several machines."""

from rewire.measure.store.open import default_url, open_store
from rewire.measure.store.runs import DeviceSample, Recorder, Run, RunFacts
from rewire.measure.store.store import Store

__all__ = ["open_store", "default_url", "Store", "Run", "RunFacts", "Recorder", "DeviceSample"]
