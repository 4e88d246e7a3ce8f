"""Each module of a model goes back to the mode that it was in, whatever happens meanwhile."""

import pytest
import torch
from torch import nn

from ft_core.models.modes import modes_kept


def test_each_module_goes_back_to_its_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Dropout()))
    model.train()
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    assert set(before) == {True, False}
    with modes_kept(model):
        model.eval()
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    model.train()
    model[1][0].eval()
    with pytest.raises(RuntimeError, match="shapes"), modes_kept(model):
        model.eval()(torch.ones(3))
    assert [module.training for module in model.modules()] == before
