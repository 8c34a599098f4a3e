"""Turns files of text, tokens and conversations into token streams, and streams into batches.

It may depend on `ops` and `runtime`.
"""

from nanochat_native.data.conversation_rows import ConversationRows
from nanochat_native.data.corpus import Corpus, prepare
from nanochat_native.data.documents import DamagedFileError
from nanochat_native.data.loader import Batch, BatchLoader, Prefetcher, iterate_val
from nanochat_native.data.shards import TokenStream

__all__ = [
    "Batch",
    "BatchLoader",
    "ConversationRows",
    "Corpus",
    "DamagedFileError",
    "Prefetcher",
    "TokenStream",
    "iterate_val",
    "prepare",
]
