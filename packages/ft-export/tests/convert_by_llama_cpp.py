"""Upstream's converter, in a process of its own: FOLDER-OF-llama.cpp MODEL OUT TYPE PRE [MORE…].

It knows the splitting rules of a byte-level BPE by the hash of what published tokenizers make of a text. A tokenizer
trained in a test has no such hash, so the rules' name is given.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    upstream, model, out, kind, pre, *more = sys.argv[1:]
    sys.path[:0] = [upstream, str(Path(upstream) / "gguf-py")]
    import conversion.base
    import convert_hf_to_gguf

    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", kind, "--no-lazy", *more]
    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
