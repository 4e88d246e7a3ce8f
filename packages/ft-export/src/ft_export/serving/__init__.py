"""What the exporters ``vllm`` and ``sglang`` share: a folder that stands alone, its checks, and how it is started."""

from ft_export.serving.folder import Whole, write_whole
from ft_export.serving.forms import FORMS, Form

__all__ = ["FORMS", "Form", "Whole", "write_whole"]
