"""The fast path: a model's layers computed by ft_kernels, on the instance, with the same mathematics."""

from ft_core.fast.again import Choice
from ft_core.fast.ahead import compile_ahead
from ft_core.fast.check import Comparison, compare, trial
from ft_core.fast.decoding import forget
from ft_core.fast.find import NotFast, layout_of
from ft_core.fast.layout import Activation, Attention, Layout, Mlp, Norm, Norms, activation
from ft_core.fast.swap import FastPath, disable, enable, fast_path_of

__all__ = [
    "Activation",
    "Attention",
    "Choice",
    "Comparison",
    "FastPath",
    "Layout",
    "Mlp",
    "Norm",
    "Norms",
    "NotFast",
    "activation",
    "compare",
    "compile_ahead",
    "disable",
    "enable",
    "fast_path_of",
    "forget",
    "layout_of",
    "trial",
]
