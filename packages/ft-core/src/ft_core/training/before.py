"""What can be refused at once: before torch and transformers are imported, which takes seconds."""

from __future__ import annotations

from pathlib import Path

from ft_core.config import TrainConfig
from ft_core.data.reading import check_sources
from ft_core.errors import FormError
from ft_core.models.source import check_local
from ft_core.plugins import MethodSpec, registry
from ft_core.runs import Run
from ft_core.training.disk import disk_folder
from ft_core.training.modality import of_modality, with_local_task

__all__ = ["check_before", "check_data"]


def check_before(config: TrainConfig, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output that is taken, a model's or disk folder that is none, and data not there or of no known form.

    All of it is checked again where it is used; what needs the Hub or more than a look is checked only there.

    Raises:
        FtError: one line, the same as later.
    """
    run = Run(str(config.output))
    run.check_free(resume=resume, overwrite=overwrite)
    check_local(config.model)
    disk_folder(config)
    config = with_local_task(config)
    try:
        check_data(config, held_out=not (resume and run.is_run))  # a resumed run has its rows
    except FormError:
        is_here = Path(config.model).expanduser().exists() or config.model.startswith("package:")
        if is_here or "task" in config.model_fields_set:
            raise
        # The Hub's model may be one whose rows are others, which is known once it is here.


def check_data(config: TrainConfig, *, held_out: bool = True) -> None:
    """Refuse data that is not there or of no known form; ``held_out``: that of ``eval_data`` too.

    Raises:
        DataError: one line, the same as where it is read.
    """
    formats = registry().get(MethodSpec, config.method).formats
    form = of_modality(config, "rows")
    check_sources(config.data, formats, form)
    if config.eval_data is not None and held_out:
        check_sources(config.eval_data, formats, form)
