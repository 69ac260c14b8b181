"""Conversion of a T5-family model to another format, verified."""

from typing import TYPE_CHECKING

from fat5.lazy import lazy

if TYPE_CHECKING:
    from fat5.convert.config import ConvertConfig as ConvertConfig
    from fat5.convert.conversion import Conversion as Conversion
    from fat5.convert.conversion import convert as convert

__getattr__, __dir__ = lazy(__name__, __file__)
