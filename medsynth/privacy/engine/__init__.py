"""Exact per-patient clipping in one backward: book-keeping (Bu et al. 2023) with rules for every layer of a U-Net.

``tape`` runs a model so that each trained layer hands its input and output gradient over; the layer families
(``convolution``, ``linear``, ``normalisation``, ``embedding``) turn them into squared norms and clipped sums;
``choice`` picks the cheapest rule by timing; ``bookkeeping`` is the backend.
"""
