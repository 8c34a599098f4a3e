"""Turns files of text, tokens and conversations into token streams, and streams into batches.

It may depend on `ops` and `runtime`.
"""

from nanochat_native.data.conversation_rows import ConversationRows
from nanochat_native.data.corpus import Corpus, Validation, prepare
from nanochat_native.data.documents import DamagedFileError
from nanochat_native.data.loader import Batch, BatchLoader, Loader, Prefetcher, iterate_val
from nanochat_native.data.order import Packing, iterate_validation, make_loader
from nanochat_native.data.shards import TokenStream

__all__ = [
    "Batch",
    "BatchLoader",
    "ConversationRows",
    "Corpus",
    "DamagedFileError",
    "Loader",
    "Packing",
    "Prefetcher",
    "TokenStream",
    "Validation",
    "iterate_val",
    "iterate_validation",
    "make_loader",
    "prepare",
]
