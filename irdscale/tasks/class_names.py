"""The class names that Hugging Face data sets keep in a file's metadata."""

from __future__ import annotations

import pyarrow as pa

from irdscale.models.classes import are_placeholders, places_of


def declared_names(table: pa.Table, label: str) -> list[str] | None:
    """The names of a column's class numbers, or None where the metadata have none."""
    if b"huggingface" not in (table.schema.metadata or {}):
        return None
    import datasets

    feature = datasets.Features.from_arrow_schema(table.schema).get(label)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def in_one_order(shards: list[pa.Table], label: str | None) -> list[pa.Table]:
    """The shards of a split, renumbered so that a class number means the same name in all of them."""
    if label is None or len(shards) == 1:
        return shards
    named = [declared_names(shard, label) for shard in shards]
    if all(names == named[0] for names in named):
        return shards
    given = [names for names in named if names]
    names = list(next((own for own in given if not are_placeholders(own)), given[0]))
    places: list[dict[int, int]] = []
    for own in named:
        places.append({})
        for number, name in enumerate(own or ()):
            found = places_of([name], names)
            if found is None and are_placeholders(own or ()):
                found = [number]
            elif found is None:
                names.append(name)
            places[-1][number] = len(names) - 1 if found is None else found[0]
    shards = [_renumbered(*each, label, len(names)) for each in zip(shards, places, strict=True)]
    return [_with_names(shards[0], label, names), *shards[1:]]


def _renumbered(table: pa.Table, places: dict[int, int], label: str, count: int) -> pa.Table:
    if not places:
        return table
    column = table.column(label)
    # Missing labels, -1 and numbers beyond the classes stay invalid.
    numbers = [
        value if value is None or value < 0 else places.get(value, count + value) for value in column.to_pylist()
    ]
    return table.set_column(table.column_names.index(label), label, pa.array(numbers, column.type))


def _with_names(table: pa.Table, label: str, names: list[str]) -> pa.Table:
    import datasets

    features = datasets.Features.from_arrow_schema(table.schema)
    features[label] = datasets.ClassLabel(names=names)
    return table.replace_schema_metadata(features.arrow_schema.metadata)
