"""Products of two 32-bit sizes, and sizes cut to 32 bits, that become 64-bit numbers or addresses: wrong in tensors that
no test can hold.

The rule needs types, so it reads the compiler's own form of the emulator's kernels: the build writes it (-fdump-tree-ssa)
beside each object. There, `static_cast<int>(a * b)` and `a * b` of two ints are the same, a constant factor is a number,
and `pointer + product` converts the product.

These count as products, too:

- a constant multiple of a number that may be a size: one that was cut from 64 bits or loaded, not the number of a thread or
  of an iteration
- a sum to which each iteration of a loop adds a size, and a counter that is compared with a 64-bit number, unless a
  comparison in 32 bits limits the variable

A cut size is a 64-bit number that was converted to 32 bits, or a sum with one. A remainder, a quotient and a minimum with a
32-bit number fit 32 bits, so they are none. Not followed: a cut size that passes through a function's argument, a member or
a lambda.
"""

import re
from collections.abc import Iterator
from pathlib import Path

SLICE = "a column of a slice of values"
SHARED, LANE = "an index of shared memory", "a number of a lane or of its mode"
ROW, CHANNEL = "a row of a chunk", "a channel of a head"
EXCEPTIONS = {
    "return data_ + row * pitch_ + u / 8 * kBlock + (u % 8 ^ r % 8) * kUnit;": SHARED,
    "return data[i / kPart * plane(vectors) + vector * kPart + i % kPart];": SHARED,
    "scores[at] = drop && drop.dropped(row, origin + at) ? -kInfinity<R> : sum[i] * scale;": SHARED,
    "const R weight = key + i * turns < keys ? scores[key + i * turns] : 0;": SHARED,
    "const int64_t channel = int64_t{thread / split} * 2;": "a tile has fewer than 2^32 threads",
    "const R* const stage = shared + stage_number * Tiling::kStage;": SHARED,
    "if (column < window.end) copy(column, slice, shared + stage_number * Tiling::kStage);": SHARED,
    "return reinterpret_cast<const gpu::bf16*>(words + i * kRowPitch + block * kBlock + step_of(k)) + e;": SHARED,
    "channel = first_channel + half * 8;": LANE,
    "for (int mode = 0; mode < scan.lanes; mode += 4 * groups) {": LANE,
    "const int64_t at = (block.token + my_row - block.cached) * p.heads + block.head;": ROW,
    "const uint64_t dropped = drop ? dropped_scores<Product>(drop, block.start + query, block.start + key) : 0;": ROW,
    "T* const tile = typed<T>(plan.tiles) + (2 * panel * plan.blocks * kEdge + query) * kEdge;": ROW,
    "for (int c = threadIdx.x; c < p.key_dim; c += kThreads) {": CHANNEL,
    "const R* const key_scores = scores + first_row * Tiling::kScorePitch + (slice - products) * Tiling::kSliceKeys;": SHARED,
    "const auto plane = [&](int index) { return scan.plane<float>(index)[(4 * n + t) * scan.width + channel]; };": LANE,
    "while (1 << layout.log_lanes < gpu::kWarp && 1 << layout.log_lanes < layout.vectors) ++layout.log_lanes;": LANE,
    "if (layout.vectors > 1 << layout.log_lanes)": LANE,
    "if constexpr (kHeld) held_[r] = gpu::ld<Vector>(from_[r] + (first_ < vectors_ ? first_ : 0) * kWidth);": LANE,
    "Product::template load<false>(a, p.value_dim - at, d_o.from(query, at));": CHANNEL,
    "Product::template load<false>(b, p.value_dim - at, v.from(key, at));": CHANNEL,
    "static_cast<T*>(p.o)[((block.token + i / columns) * p.heads + head) * p.value_dim + column + i % columns] = T{};": SLICE,
    (
        "const int columns = static_cast<int>(p.value_dim - first_column < kColumns ? p.value_dim - first_column : kColumns);"
    ): SLICE,
    "store_padding<T>(p, block, head, first_column, columns);": SLICE,
    "if (whole) gpu::st(o + r * stride + c, gpu::ld_shared<gpu::Pack<T, Tile<T>::kUnit>>(from));": SLICE,
    "else o[r * stride + c] = *from;": SLICE,
    "if (__syncthreads_or(any_nan)) repair<T, kColumns>(p, block, window, head, first_column, columns, k, v, lse);": SLICE,
    (
        "const int64_t depth = slab < key_slabs ? p.key_dim - slab * kDepth : "
        "p.value_dim - (slab - key_slabs) * kDepth;"
    ): CHANNEL,
}
NARROW = {"int", "unsigned int", "int32_t", "uint32_t"}
WIDE = {"long int", "long unsigned int", "int64_t", "uint64_t", "size_t", "sizetype", "ssizetype", "unsigned long"}
DECLARED = re.compile(r"(?:const )?(\w[\w ]*?) (?:const )?([\w.]+)$")
ASSIGNED = re.compile(r"^  (?:\[(\S+):(\d+):\d+\] )?([\w.]+(?:\(D\))?) = ([^;]*);", re.MULTILINE)
PRODUCT = re.compile(r"[a-zA-Z_][\w.]*(?:\(D\))? (?:\*|<<) [a-zA-Z_]")
SUM = re.compile(r"(?:\([a-z ]+\) )?[\w.()]+$|[\w.()]+ [+/-] -?[\w.()]+$|MAX_EXPR <")
LIMITED = re.compile(r"\([\w ]+\) |MIN_EXPR <|\S+ [/%] ")
MULTIPLE = re.compile(r" (?:\*|<<) ")
LOADED = re.compile(r"(?!.*\bwarp$)(?:\*|MEM|[a-z_]\w*\.[a-z]|\w+(?:\(D\))?->)[^(]*$")
CAST = re.compile(r"\([\w ]+\) (\S+)$")
NAME = re.compile(r"[a-zA-Z_][\w.]*(?:\(D\))?")
PLACE = re.compile(r"\[\S+:\d+:\d+\] ")
VERSION = re.compile(r"(?<=.)_\d+(?:\(D\))?$")  # "row_12" is a version of `row`; a temporary, "_12", has no other name
MERGED = re.compile(r"^  # (\S+) = PHI <(.*)>$", re.MULTILINE)  # values from before a loop and from its iterations
COMPARED = re.compile(r"[ (]([\w.]+(?:\(D\))?) (?:[<>]=?|!=) ([\w.]+(?:\(D\))?)[;)]")


def widened_products(build: Path, kernels: Path) -> dict[tuple[str, int], str]:
    """Lines with such a product in the kernel files that the emulator's build has compiled: {(file, number): text}."""
    texts = {path.name: path.read_text().splitlines() for path in kernels.rglob("*.cu*")}
    forms = [path for path in build.rglob("emulated_kernels/*.ssa") if path.name.partition(".")[0] + ".cu" in texts]
    places = {place for form in forms for place in _places(form.read_text())}
    return {(file, line): texts[file][line - 1].strip() for file, line in sorted(places) if file in texts}


def _origins(name: str, terms: dict[str, set[str]]) -> set[str]:
    """All variables of which this one is a sum; in a loop also itself."""
    found = set()
    left = [name]
    while left:
        new = terms.get(left.pop(), set()) - found
        found |= new
        left += new
    return found


def _places(text: str) -> Iterator[tuple[str, int]]:
    """File and line of each conversion to 64 bits of a product, a cut size, a sum of them or a 64-bit loop's counter."""
    for function in text.split("\n;; Function ")[1:]:
        head, _, body = function.partition("\n{\n")
        arguments = head.rpartition("\n")[2].strip(")").split(", ")
        variables = re.findall(r"^  (\w.*);$", body, re.MULTILINE)
        declared = {match[2]: match[1] for match in map(DECLARED.search, arguments + variables) if match}
        types = {name: declared.get(name) or declared.get(VERSION.sub("", name)) for name in {*NAME.findall(body)}}
        narrow = {name for name, declaration in types.items() if declaration in NARROW}  # of 32 bits
        wide = {name for name, declaration in types.items() if declaration in WIDE}
        assigned = [(file, line, to, PLACE.sub("", source)) for file, line, to, source in ASSIGNED.findall(body)]
        sums = {to: source.partition(" / ")[0] for *_, to, source in assigned if SUM.match(source)}
        sums |= {to: PLACE.sub("", values) for to, values in MERGED.findall(body)}
        terms = {to: set(NAME.findall(sums[to])) for to in sums.keys() & narrow}
        origins = {name: _origins(name, terms) for name in narrow}
        # By name: the names of the loop in which it is summed up.
        loops = {name: {other for other in origins[name] if name in origins.get(other, ())} for name in terms}
        comparisons = COMPARED.findall(body)
        limited = {name for pair in comparisons for name in pair}
        limits = {name for pair in comparisons if all(map(NAME.match, pair)) for name in pair}  # of two variables
        counters = {name for name, loop in loops.items() if loop and not loop & limited}
        casts = [(file, line, to, match[1]) for file, line, to, source in assigned if (match := CAST.match(source))]
        small = set()  # 64-bit numbers that fit 32 bits
        for *_, to, source in assigned:
            operands = re.findall(r"[\w.]+(?:\(D\))?", source.partition(" / ")[0])
            if to in wide and LIMITED.match(source) and any(x in small | narrow or x.isdigit() for x in operands):
                small.add(to)
        cuts = {to for *_, to, source in casts if to in narrow and source in wide - small}
        sizes = {to for *_, to, source in casts if to in narrow and source in wide}
        sizes |= {to for *_, to, source in assigned if to in narrow and LOADED.match(source)}
        products = {to for *_, to, source in assigned if to in narrow and PRODUCT.match(source)}
        products |= {other for name in counters if terms[name] & sizes for other in loops[name]}
        for *_, to, source in assigned:
            names = set(NAME.findall(source)) & narrow
            if MULTIPLE.search(source) and to in narrow and names.union(*map(origins.get, names)) & (sizes | products):
                products.add(to)
        for file, line, to, source in casts:
            if to in wide and source in narrow:
                if (origins[source] | {source}) & (products | cuts) or (source in counters and to in limits):
                    yield Path(file).name, int(line)
