"""Exact memory-bank contrastive training of dense retrievers, in time linear in the bank."""

from contaccum_ext import reference
from contaccum_ext.bank import DualMemoryBank
from contaccum_ext.bank_size import mean_decay
from contaccum_ext.functional import contaccum_loss
from contaccum_ext.layout import BankLayout
from contaccum_ext.losses import ContAccumLoss
from contaccum_ext.processes import keep_banks_from_ddp
from contaccum_ext.transport import BankTransport, transport

__all__ = [
    "BankLayout",
    "BankTransport",
    "ContAccumLoss",
    "DualMemoryBank",
    "contaccum_loss",
    "keep_banks_from_ddp",
    "mean_decay",
    "reference",
    "transport",
]
__version__ = "0.1.0"
