"""GGUF files for llama.cpp: conversion (``convert``) and the checked export (``export``)."""

from ft_export.gguf.converter import Converted, convert

__all__ = ["Converted", "convert"]
