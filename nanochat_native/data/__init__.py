"""Text and token files become token streams, and streams become batches."""

from nanochat_native.data.corpus import Corpus, prepare
from nanochat_native.data.documents import DamagedFileError
from nanochat_native.data.loader import Batch, BatchLoader, Prefetcher, iterate_val
from nanochat_native.data.rows import Rows
from nanochat_native.data.shards import TokenStream

__all__ = [
    "Batch",
    "BatchLoader",
    "Corpus",
    "DamagedFileError",
    "Prefetcher",
    "Rows",
    "TokenStream",
    "iterate_val",
    "prepare",
]
