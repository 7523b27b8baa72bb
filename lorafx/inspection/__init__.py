"""Looking at adapters: what each site of one makes of the model, as data, as a table and as a picture."""

from __future__ import annotations
