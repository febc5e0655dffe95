"""The card: what was asked, how, of what, read from the manifest and the recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tda.recipe import Recipe
from tda.report.data import Card, Checkpoint
from tda.report.examples import Gallery, clean


def card_of(
    run: Any,
    query_name: str,
    recipe: Recipe,
    queries: Gallery,
    train: Gallery,
    dampings: Sequence[float],
) -> Card:
    manifest: Mapping[str, Any] = run.store.manifest
    measurement = manifest.get("measurement", {})
    digests = [("measurement", measurement.get("digest"))]
    digests += [
        (f"model {key}".removesuffix(" digest"), value)
        for key, value in _digests(manifest.get("model", {}))
    ]
    data = manifest.get("data", {}).get("train", {})
    digests.append(("training data", data.get("digest") or _content_digest(train)))
    digests.append((f"queries {query_name}", _content_digest(queries)))
    return Card(
        run=clean(run.store.path.name, 120),
        query_set=clean(query_name, 120),
        recipe=recipe.name,
        summary=recipe.summary,
        formula=recipe.formula,
        explained=recipe.explain(),
        reference=recipe.reference,
        damping=damping_text(recipe),
        measurement=clean(measurement.get("name", "unknown"), 120),
        projection=_projection(manifest.get("projection", {})),
        dtype=clean(manifest.get("dtype", "unknown"), 40),
        checkpoints=_checkpoints(manifest, queries, train, dampings),
        facts=tuple(
            (clean(key, 60), clean(value, 200))
            for key, value in manifest.get("model", {}).items()
            if not isinstance(value, Mapping | list) and not _is_digest(key)
        ),
        digests=tuple((clean(key, 80), clean(value, 200)) for key, value in digests if value),
        versions=tuple(
            (clean(key, 60), clean(value, 60))
            for key, value in sorted(manifest.get("versions", {}).items())
        ),
    )


def damping_text(recipe: Recipe) -> str:
    """The damping of a recipe in words."""
    if recipe.function == "identity":
        return "none: this recipe uses no curvature"
    if recipe.damping == "auto":
        plain = "λ = tr(H)/n, the mean squared row norm over n"
        if recipe.implies_damping:
            return (
                "automatic, not tuned: the λ that the training schedule implies where the "
                f"checkpoints carry it, else {plain}; as used, beside each checkpoint"
            )
        return f"automatic, not tuned: {plain}"
    return f"λ = {recipe.damping:g} · tr(H)/k, that many times the mean eigenvalue"


def _checkpoints(
    manifest: Mapping[str, Any], queries: Gallery, train: Gallery, dampings: Sequence[float]
) -> tuple[Checkpoint, ...]:
    def mean(gallery: Gallery, checkpoint: int) -> float | None:
        loss = gallery.column("loss")
        if loss is None or not np.isfinite(loss[checkpoint]).any():
            return None
        return float(np.nanmean(loss[checkpoint], dtype=np.float64))

    return tuple(
        Checkpoint(
            name=clean(checkpoint.get("name", position), 120),
            digest=clean(checkpoint.get("digest", ""), 200),
            step=checkpoint.get("step"),
            learning_rate=checkpoint.get("learning_rate"),
            train_loss=mean(train, position),
            query_loss=mean(queries, position),
            damping=float(dampings[position]) if dampings else None,
        )
        for position, checkpoint in enumerate(manifest.get("checkpoints", []))
    )


def _is_digest(key: str) -> bool:
    return "digest" in key or "hash" in key


def _digests(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in facts.items() if _is_digest(key)]


def _content_digest(gallery: Gallery) -> str | None:
    digests = gallery.column("digest")
    if digests is None:
        return None
    return hashlib.blake2b(np.ascontiguousarray(digests).tobytes(), digest_size=16).hexdigest()


def _projection(spec: Mapping[str, Any]) -> str:
    """Kind first, then what makes it this one: "count_sketch, dim 2048, seed 0"."""
    rest = [
        f"{key} {value}"
        for key, value in spec.items()
        if key != "kind" and not _is_digest(key) and isinstance(value, str | int | float)
    ]
    return clean(", ".join([str(spec.get("kind", "unknown")), *rest]), 300)
