"""llama.cpp's own quantizing, in a process without xllamacpp: LIBRARIES FILE CODE=OUT ..."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


class Parameters(ctypes.Structure):
    """The first of ``llama_model_quantize_params``, and room for the others."""

    _fields_ = [("threads", ctypes.c_int32), ("file_type", ctypes.c_int32), ("others", ctypes.c_uint8 * 256)]


def main() -> None:
    folder, source = Path(sys.argv[1]), sys.argv[2]
    for pattern in ("libggml-base*", "libggml.*"):
        ctypes.CDLL(str(min(folder.glob(pattern))), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(next(file for file in folder.glob("libllama.*"))))
    library.llama_model_quantize_default_params.restype = Parameters
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
    library.llama_backend_init()
    for word in sys.argv[3:]:
        code, _, out = word.partition("=")
        parameters = library.llama_model_quantize_default_params()
        parameters.threads, parameters.file_type = 2, int(code)
        if library.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)):
            sys.exit(f"file type {code} failed")


if __name__ == "__main__":
    main()
