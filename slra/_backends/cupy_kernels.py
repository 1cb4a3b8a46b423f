"""CUDA kernels, each one pass over its arrays; compiled by CuPy when first called.

A kernel is written once, as templates in ``SOURCE`` and a line that calls them, and made for each dtype it is for.
The types of its parameters are spelled out, so that Python numbers may stand for arrays. The same text is compiled by a
C++ compiler in the tests, which is why it holds nothing that needs a GPU.
"""

from typing import Any, NamedTuple

import cupy

from slra._typing import Array

__all__ = ["DEFINITIONS", "KERNELS", "SOURCE", "build", "kernel"]

# The dtypes that a kernel can be made for, and the real dtype that each is computed in.
HALF = {"float16": "float32"}
REAL = {"float32": "float32", "float64": "float64"}
COMPLEX = {"complex64": "float32", "complex128": "float64"}
WHOLE = {"int32": "int32"}
# What C calls a real dtype.
C_NAMES = {
    "float16": "float16",
    "float32": "float",
    "float64": "double",
    "complex64": "complex<float>",
    "complex128": "complex<double>",
    "int32": "int",
}

SOURCE = r"""
// NaN takes neither branch, and x - x is NaN again.
template <typename R> __device__ R slra_shrink(R x, R tau) {
    return x - (x < -tau ? -tau : x > tau ? tau : x);
}

// Written so that NaN stays.
template <typename T, typename R> __device__ T slra_shorten(T x, R size, R tau) {
    const R shrunk = size <= tau ? R(0) : size - tau;
    return x * (shrunk / (size == R(0) ? R(1) : size));
}

template <typename R> __device__ complex<R> slra_shrink(complex<R> x, R tau) {
    return slra_shorten(x, abs(x), tau);
}

template <typename R> __device__ R slra_ldexp(R x, int exponent) {
    return ldexp(x, exponent);
}

template <typename R> __device__ complex<R> slra_ldexp(complex<R> x, int exponent) {
    return complex<R>(slra_ldexp(x.real(), exponent), slra_ldexp(x.imag(), exponent));
}

template <typename T, typename R> __device__ T slra_phase(T x, R size, R least) {
    return size > least ? x / size : T(R(1));
}

template <typename R> __device__ R slra_square(R x) {
    return x * x;
}

// In double precision, whatever the precision of x.
template <typename R> __device__ double slra_wide(R x) {
    return x;
}

template <typename R> __device__ complex<double> slra_wide(complex<R> x) {
    return complex<double>(x.real(), x.imag());
}

template <typename R> __device__ double slra_wide_square(R x) {
    return double(x) * double(x);
}

template <typename R> __device__ double slra_wide_square(complex<R> x) {
    return slra_wide_square(x.real()) + slra_wide_square(x.imag());
}

template <typename R> __device__ double slra_wide_product(R x, R y) {
    return double(x) * double(y);
}

template <typename R> __device__ double slra_wide_product(complex<R> x, complex<R> y) {
    return slra_wide_product(x.real(), y.real()) + slra_wide_product(x.imag(), y.imag());
}

// What a step is judged by, see `step_products`.
struct slra_sums {
    double of[7];
};

template <typename T, typename R>
__device__ slra_sums slra_step(T y, T slope, T next, T grad, T move, R factor) {
    const T d = next - y, turn = grad - slope, r = turn + factor * d;
    return {{
        slra_wide_square(d), slra_wide_square(turn), slra_wide_square(r), slra_wide_square(grad),
        slra_wide_square(next), slra_wide_product(d, turn), slra_wide_product(d, move),
    }};
}

inline __device__ slra_sums slra_add(slra_sums a, slra_sums b) {
    for (int k = 0; k < 7; k++) {
        a.of[k] += b.of[k];
    }
    return a;
}

// NaN where one is NaN.
template <typename R> __device__ R slra_larger(R a, R b) {
    return a > b || a != a ? a : b;
}

template <typename R> __device__ R slra_part_size(R x) {
    return abs(x);
}

template <typename R> __device__ R slra_part_size(complex<R> x) {
    return slra_larger(R(abs(x.real())), R(abs(x.imag())));
}

// NaN takes the second branch, and stays.
template <typename R> __device__ R slra_excess(R x, R tau) {
    return x <= tau ? R(0) : x - tau;
}

template <typename R> __device__ R slra_cap(R product, R softcap) {
    return softcap == R(0) ? product : softcap * tanh(product / softcap);
}

template <typename R> __device__ R slra_mask(R score, bool attends) {
    return attends ? score : -R(CUDART_INF);
}

template <typename R> __device__ R slra_mask(R score, R bias) {
    return score + bias;
}

template <typename R, typename M>
__device__ R slra_score(R capped, M mask, int column, int limit) {
    return column <= limit ? slra_mask(capped, mask) : -R(CUDART_INF);
}

// exp(-inf - -inf) would be NaN: a row that has met no key keeps weights of zero.
template <typename R> __device__ R slra_weight(R score, R peak) {
    return exp(score - (peak == -R(CUDART_INF) ? R(0) : peak));
}

// How far a product of a triangular factor with itself is off, in units of the diagonal; NaN counts as infinite, as
// does a pivot that is not positive.
template <typename T, typename R>
__device__ R slra_misfit(T product, T given, R left, R right, R pivot) {
    const R off = abs(product - given) / sqrt(left * right);
    return off == off && pivot > R(0) ? off : R(CUDART_INF);
}

// How far a product of a matrix and a vector is from a multiple of the vector; NaN counts as infinite.
template <typename T, typename R> __device__ R slra_eigen_misfit(T product, T vector, R value) {
    const R off = abs(product - vector * value);
    return off == off ? off : R(CUDART_INF);
}

template <typename T, typename R> __device__ T slra_kept(T x, R misfit, R limit) {
    return misfit <= limit ? x : T(R(CUDART_NAN));
}

// Largest score of a row, and the sum of exp(score - peak); one for a row of -inf, which joins to others as nothing.
template <typename R> struct slra_row {
    R peak;
    R total;
};

template <typename R> __device__ slra_row<R> slra_one(R score) {
    return {score, R(1)};
}

template <typename R> __device__ slra_row<R> slra_part(R peak, R total) {
    return {peak, total};
}

template <typename R> __device__ slra_row<R> slra_join(slra_row<R> a, slra_row<R> b) {
    // NaN goes on top, and makes the total NaN.
    const bool first = a.peak >= b.peak || a.peak != a.peak;
    const slra_row<R> top = first ? a : b, low = first ? b : a;
    return {top.peak, top.total + low.total * slra_weight(low.peak, top.peak)};
}

// Sum of n products, of neighbours and of every step-th entry.
template <typename R, typename X, typename W>
__device__ R slra_dot(const X& x, const W& w, long long at_x, long long at_w, long long step, long long n) {
    R sum = 0;
    for (long long k = 0; k < n; k++) {
        sum += x[at_x + k] * w[at_w + k * step];
    }
    return sum;
}

// The same of the differences of neighbours.
template <typename R, typename X, typename S, typename W>
__device__ R slra_shifted_dot(
    const X& x, const S& shift, const W& w,
    long long at_x, long long at_shift, long long at_w, long long step, long long n
) {
    R sum = 0;
    for (long long k = 0; k < n; k++) {
        sum += (x[at_x + k] - shift[at_shift + k]) * w[at_w + k * step];
    }
    return sum;
}

template <typename R> __device__ R slra_log_sum(R peak, R total) {
    return total == R(0) ? peak : peak + log(total);
}

// Log-sum-exps and outputs of two parts; +inf counts as none, and then the output does not matter.
template <typename R> __device__ R slra_none(R lse) {
    return lse == R(CUDART_INF) ? -R(CUDART_INF) : lse;
}

template <typename R> struct slra_pair {
    R left;
    R right;
    R lse;
};

template <typename R> __device__ slra_pair<R> slra_merge(R first, R second) {
    const R a = slra_none(first), b = slra_none(second), peak = slra_larger(a, b);
    const R left = slra_weight(a, peak), right = slra_weight(b, peak), total = left + right;
    const R divisor = total == R(0) ? R(1) : total;
    return {left / divisor, right / divisor, slra_log_sum(peak, total)};
}

template <typename R> __device__ R slra_part_of(R out, R lse, R weight) {
    return slra_none(lse) == -R(CUDART_INF) ? R(0) : weight * out;
}

// Feature j of a row that is rotated: the leading 2 n in pairs (j, j + n).
template <typename X, typename T>
__device__ auto slra_turned(
    const X& x, const T& cos, const T& sin, long long i, long long j, long long at, long long n
) {
    const auto here = x[i];
    if (j < n) {
        return here * cos[at + j] - x[i + n] * sin[at + j];
    }
    return j < 2 * n ? here * cos[at + j - n] + x[i - n] * sin[at + j - n] : here;
}

// Bits of a number that is not negative, which are ordered as the numbers are.
inline __device__ long long slra_bits(float x) {
    union { float number; int bits; } both;
    both.number = x;
    return both.bits;
}

inline __device__ long long slra_bits(double x) {
    union { double number; long long bits; } both;
    both.number = x;
    return both.bits;
}

// Whether entry i is one of the k of largest modulus in its row of n, the first of those that tie. NaN is larger than
// any number: exactly k are, as what is written has room for so many.
template <typename A, typename T>
__device__ bool slra_is_among(const A& all, T x, long long i, long long n, long long k) {
    const long long size = slra_bits(abs(x));
    const long long start = i - i % n;
    long long rank = 0;
    for (long long j = start; j < start + n && rank < k; j++) {
        const long long other = slra_bits(abs(all[j]));
        rank += other > size || (other == size && j < i);
    }
    return rank < k;
}

// Place of what is kept among what is kept of its row, in an array of k a row.
template <typename A> __device__ long long slra_place(const A& kept, long long i, long long n, long long k) {
    long long place = i / n * k;
    for (long long j = i - i % n; j < i; j++) {
        place += kept[j];
    }
    return place;
}

// Runs from a place of a row to another with what came before it in the row: how many moduli larger than that of these
// bits, and how many of the same.
template <typename X>
__device__ long long slra_counted(const X& x, long long start, long long stop, long long bits) {
    long long found = 0;
    for (long long j = start; j < stop; j++) {
        const long long own = slra_bits(abs(x[j]));
        found += own > bits ? 1LL : own == bits ? 1LL << 32 : 0LL;
    }
    return found;
}

template <typename X, typename V, typename C>
__device__ void slra_write_largest(
    const X& x, V& values, C& columns, long long start, long long stop, long long row, long long width,
    long long k, long long bits, long long ties, long long before
) {
    long long above = before & 0xffffffffLL, same = before >> 32;
    for (long long j = start; j < stop; j++) {
        const long long own = slra_bits(abs(x[j]));
        if (own > bits || (own == bits && same < ties)) {
            const long long place = row * k + above + (same < ties ? same : ties);
            values[place] = x[j];
            columns[place] = j - row * width;
        }
        above += own > bits;
        same += own == bits;
    }
}

// An integer in two's complement from its planes, each two bytes of one bit a token.
template <typename H> __device__ int slra_integer(const H& heap, long long start, int width, int token) {
    int code = 0;
    for (int plane = 0; plane < width; plane++) {
        code |= (heap[start + 2 * plane + (token >> 3)] >> (token & 7) & 1) << plane;
    }
    return width > 0 && code >> (width - 1) ? code - (1 << width) : code;
}

template <typename R> __device__ R slra_slope(R weight, R capped, R softcap) {
    const R ratio = softcap == R(0) ? R(0) : capped / softcap;
    return weight * (R(1) - ratio * ratio);
}
"""

# One tile of attention: a softcap of 0 is none, and limit 0 for column 0 no causal bound.
_TILE = "int32 column, int32 limit, {T} softcap"
_SCORE = "score = slra_score(slra_cap(product, softcap), mask, column, limit)"
_JOIN = """
    const slra_row<{C}> before = {{peak, total}}, tile = {{tile_peak, tile_total}};
    const slra_row<{C}> both = slra_join(before, tile);
    new_peak = both.peak;
    new_total = both.total;
    decay = slra_weight(peak, both.peak)
"""
_GRADIENTS = """
    const auto capped = slra_cap(product, softcap);
    const auto p = slra_weight(slra_score(capped, mask, column, limit), lse);
    weight = p;
    grad_score = slra_slope(p, capped, softcap) * (grad_weight - delta)
"""


class Elementwise(NamedTuple):
    """A kernel over arrays that broadcast.

    T stands for the dtype, R for the real one it is computed in, W for its kind in double precision; U and C for what
    C calls the first two; X for ``x`` as it enters the computation.
    """

    dtypes: dict[str, str]
    inputs: str
    outputs: str
    operation: str


class Reduction(NamedTuple):
    """A kernel that takes a function of each entry and combines the values, by default to their sum.

    Where CuPy hands it to CUB, it renames the parameters by replacing their names in the text, inside words too.
    """

    dtypes: dict[str, str]
    inputs: str
    outputs: str
    value: str
    result: str
    combination: str = "a + b"
    identity: str = "0"
    # Type of what is combined, where it is not that of the output.
    kind: str = ""


DEFINITIONS: dict[str, Elementwise | Reduction] = {
    "soft_threshold": Elementwise(
        HALF | REAL | COMPLEX, "{T} x, {R} tau", "{T} y", "y = slra_shrink({X}, tau)"
    ),
    "soft_threshold_step": Elementwise(
        REAL | COMPLEX,
        "{T} x, {T} grad, {R} step, {R} tau",
        "{T} y",
        "y = slra_shrink(x - step * grad, tau)",
    ),
    "nonneg_threshold": Elementwise(
        HALF | REAL, "{T} x, {R} tau", "{T} y", "y = slra_excess({X}, tau)"
    ),
    "elastic_threshold": Elementwise(
        HALF | REAL | COMPLEX,
        "{T} x, {R} tau, {R} divisor",
        "{T} y",
        "y = slra_shrink({X}, tau) / divisor",
    ),
    "nonneg_threshold_step": Elementwise(
        REAL,
        "{T} x, {T} grad, {R} step, {R} tau",
        "{T} y",
        "y = slra_excess(x - step * grad, tau)",
    ),
    "elastic_threshold_step": Elementwise(
        REAL | COMPLEX,
        "{T} x, {T} grad, {R} step, {R} tau, {R} divisor",
        "{T} y",
        "y = slra_shrink(x - step * grad, tau) / divisor",
    ),
    "power_of_two": Elementwise(
        REAL | COMPLEX, "{T} x, int32 exponent", "{T} y", "y = slra_ldexp(x, exponent)"
    ),
    "extrapolate": Elementwise(
        REAL | COMPLEX, "{T} x, {T} move, {R} factor", "{T} y", "y = x + factor * move"
    ),
    "wide_step": Reduction(
        REAL | COMPLEX,
        "{T} y, {T} slope, {T} next, {T} grad, {T} move, {R} factor",
        ", ".join(f"float64 sum{k}" for k in range(7)),
        "slra_step(y, slope, next, grad, move, factor)",
        ", ".join(f"sum{k} = a.of[{k}]" for k in range(7)),
        "slra_add(a, b)",
        "slra_sums()",
        "slra_sums",
    ),
    "sum_abs": Reduction(HALF | REAL | COMPLEX, "{T} x", "{R} total", "abs({X})", "total = a"),
    "max_abs": Reduction(
        HALF | REAL | COMPLEX,
        "{T} x",
        "{R} largest",
        "abs({X})",
        "largest = a",
        "a > b ? a : b",
    ),
    "max_part": Reduction(
        REAL | COMPLEX,
        "{T} x",
        "{R} largest",
        "slra_part_size(x)",
        "largest = a",
        "slra_larger(a, b)",
    ),
    "wide_squares": Reduction(
        REAL | COMPLEX, "{T} x", "float64 total", "slra_wide_square(x)", "total = a"
    ),
    "wide_sum": Reduction(REAL | COMPLEX, "{T} x", "{W} total", "slra_wide(x)", "total = a"),
    "wide_centered": Elementwise(
        REAL | COMPLEX, "{T} x, {W} mean", "{T} y", "y = {U}(slra_wide(x) - mean)"
    ),
    # The first row where a modulus reaches a level; a number that no row has where none does.
    "first": Reduction(
        REAL | COMPLEX,
        "{T} x, int32 row, {R} level",
        "int32 place",
        "abs(x) >= level ? row : 2147483647",
        "place = a",
        "a < b ? a : b",
        "2147483647",
    ),
    "least": Reduction(
        WHOLE, "{T} x", "{T} smallest", "x", "smallest = a", "a < b ? a : b", "2147483647"
    ),
    "unit": Elementwise(REAL, "{T} x", "{T} y", "y = x == 0 || x == {C}(CUDART_INF) ? {C}(1) : x"),
    "column_norm": Elementwise(
        REAL, "{T} square, {T} least", "{T} norm", "norm = square > least ? sqrt(square) : {C}(1)"
    ),
    "lifted": Elementwise(
        REAL | COMPLEX,
        "{T} x, {R} shift, int64 width",
        "{T} y",
        "y = i / width % width == i % width ? x + shift : x",
    ),
    "phase": Elementwise(
        REAL | COMPLEX, "{T} x, {R} least", "{T} y", "y = slra_phase(x, abs(x), least)"
    ),
    "unit_gram": Elementwise(
        REAL | COMPLEX, "{T} x, {R} left, {R} right", "{T} y", "y = x / (left * right)"
    ),
    "norm": Reduction(
        HALF | REAL | COMPLEX,
        "{T} x, {R} unit",
        "{R} size",
        "slra_square(abs({X}) / unit)",
        "size = sqrt(a)",
    ),
    "misfit": Reduction(
        REAL | COMPLEX,
        "{T} product, {T} given, {R} left, {R} right, {R} pivot",
        "{R} largest",
        "slra_misfit(product, given, left, right, pivot)",
        "largest = a",
        "a > b ? a : b",
    ),
    "eigen_misfit": Reduction(
        REAL | COMPLEX,
        "{T} product, {T} vector, {R} value",
        "{R} largest",
        "slra_eigen_misfit(product, vector, value)",
        "largest = a",
        "a > b ? a : b",
    ),
    "factor": Elementwise(
        REAL | COMPLEX, "{T} x, {R} misfit, {R} limit", "{T} y", "y = slra_kept(x, misfit, limit)"
    ),
    "group_threshold": Elementwise(
        HALF | REAL | COMPLEX,
        "{T} x, {R} size, {R} tau",
        "{T} y",
        "y = slra_shorten({X}, size, tau)",
    ),
    "scores": Elementwise(REAL, "{T} product, bool mask, " + _TILE, "{T} score", _SCORE),
    "biased_scores": Elementwise(REAL, "{T} product, {T} mask, " + _TILE, "{T} score", _SCORE),
    "weights": Elementwise(
        HALF | REAL, "{R} score, {R} peak", "{T} weight", "weight = slra_weight(score, peak)"
    ),
    "row_sums": Reduction(
        REAL,
        "{T} score",
        "{T} peak, {T} total",
        "slra_one(score)",
        "peak = a.peak, total = a.total",
        "slra_join(a, b)",
        "slra_one(-{C}(CUDART_INF))",
        "slra_row<{C}>",
    ),
    "row_joins": Reduction(
        REAL,
        "{T} part_peak, {T} part_total",
        "{T} peak, {T} total",
        "slra_part(part_peak, part_total)",
        "peak = a.peak, total = a.total",
        "slra_join(a, b)",
        "slra_one(-{C}(CUDART_INF))",
        "slra_row<{C}>",
    ),
    "softmax_result": Elementwise(
        REAL,
        "{T} sum, {T} peak, {T} total, int64 width",
        "{T} y, raw {T} lse",
        """
        y = sum / (total == 0 ? {C}(1) : total);
        if (i % width == 0) {{
            lse[i / width] = slra_log_sum(peak, total);
        }}
        """,
    ),
    "join": Elementwise(
        REAL,
        "{T} peak, {T} total, {T} tile_peak, {T} tile_total",
        "{T} new_peak, {T} new_total, {T} decay",
        _JOIN,
    ),
    "rescale": Elementwise(
        REAL, "{T} total, {T} decay, {T} part", "{T} sum", "sum = total * decay + part"
    ),
    # Of few rows, whose products cuBLAS would take several launches for.
    "put_mapped": Elementwise(
        HALF | REAL,
        "raw {R} x, raw {R} shift, raw {R} w, int64 depth, int64 width, int64 n_rows, int64 n_maps",
        "{T} y",
        """
        const long long row = i / width, map = row / n_rows % n_maps;
        y = slra_shifted_dot<{C}>(
            x, shift, w, row * depth, map * depth, map * depth * width + i % width, width, depth
        )
        """,
    ),
    "mapped_queries": Elementwise(
        REAL,
        "raw {T} q, raw {T} w, raw {T} c, int64 depth, int64 width, int64 n_rows, int64 n_heads, int64 n_shared",
        "{T} y, raw {T} shift",
        """
        const long long row = i / width, head = row / n_rows % n_heads;
        const long long map = head * n_shared + row % n_rows / (n_rows / n_shared);
        y = slra_dot<{C}>(q, w, row * depth, map * depth * width + i % width, width, depth);
        if (i % width == 0) {{
            shift[row] = slra_dot<{C}>(q, c, row * depth, head * depth, 1, depth);
        }}
        """,
    ),
    "through": Elementwise(
        REAL,
        "raw {T} sum, raw {T} peak, raw {T} total, raw {T} back, raw {T} mean, raw {T} shift, {T} scale, "
        "bool is_shifted, int64 depth, int64 width, int64 n_rows, int64 n_maps",
        "{T} y, raw {T} lse",
        """
        const long long row = i / width, map = row / n_rows % n_maps, column = i % width;
        const bool is_empty = peak[row] == -{C}(CUDART_INF);
        const {C} whole = slra_dot<{C}>(sum, back, row * depth, map * depth * width + column, width, depth);
        y = is_empty ? {C}(0) : whole / total[row] + mean[map * width + column];
        if (column == 0) {{
            const {C} more = is_shifted && !is_empty ? scale * shift[row] : {C}(0);
            lse[row] = slra_log_sum(peak[row], total[row]) + more;
        }}
        """,
    ),
    "merged": Elementwise(
        REAL,
        "{T} a, {T} lse_a, {T} b, {T} lse_b, int64 width",
        "{T} y, raw {T} lse",
        """
        const slra_pair<{C}> pair = slra_merge(lse_a, lse_b);
        y = slra_part_of(a, lse_a, pair.left) + slra_part_of(b, lse_b, pair.right);
        if (i % width == 0) {{
            lse[i / width] = pair.lse;
        }}
        """,
    ),
    "rotated": Elementwise(
        REAL,
        "raw {T} x, raw {T} cos, raw {T} sin, int64 half, int64 width, int64 n_rows, int64 n_heads, int64 n_tables",
        "{T} y",
        """
        const long long row = i / width, table = row / (n_rows * n_heads) % n_tables;
        y = slra_turned(x, cos, sin, i, i % width, (table * n_rows + row % n_rows) * half, half)
        """,
    ),
    "copy_both": Elementwise(
        HALF | REAL, "{R} a, {R} b", "{T} first, {T} second", "first = a, second = b"
    ),
    "put_rows": Elementwise(
        HALF | REAL,
        "{T} x, int64 place, int64 width, int64 n_rows, int64 n",
        "raw {T} buffer",
        """
        if (place >= 0) {{
            buffer[(i / width / n_rows * n + place) * width + i % width] = x;
        }}
        """,
    ),
    "unpack": Elementwise(
        REAL,
        "raw uint8 heap, int32 width, int64 start, int32 token",
        "{T} y",
        "y = slra_integer(heap, start, width, token)",
    ),
    "chosen_tokens": Elementwise(
        REAL,
        "raw uint8 heap, raw uint8 pairs, raw int64 starts, raw {T} whole, raw int8 codes, raw uint8 exponents, "
        "int64 row, int64 token, int32 column, "
        "int64 n_blocks, int64 n_pairs, int64 n, int64 r, int64 n_heads, int64 n_bytes, int64 n_whole",
        "{T} y",
        """
        const long long tiles = row * n_blocks + token / 16, element = row / n_heads, held = row * n + token;
        long long plane = starts[2 * tiles], tile = starts[2 * tiles + 1];
        int width = 0;
        for (int j = 0; j <= column; j++) {{
            plane += width < 15 ? width : 0;
            tile += width == 15;
            width = pairs[tiles * n_pairs + j / 2] >> (j % 2 * 4) & 15;
        }}
        if (width == 15) {{
            y = whole[(element * n_whole + tile) * 16 + token % 16];
        }} else {{
            y = slra_integer(heap, element * n_bytes + 2 * plane, width, int(token % 16));
        }}
        if (column < r && exponents[held] < 255) {{
            y -= ldexp({C}(codes[held * r + column]), int(exponents[held]));
        }}
        """,
    ),
    "keep_largest": Elementwise(
        REAL | COMPLEX,
        "raw {T} all, {T} x, int64 width, int64 k",
        "{T} y",
        "y = slra_is_among(all, x, i, width, k) ? x : {U}(0)",
    ),
    "mark_largest": Elementwise(
        REAL | COMPLEX,
        "raw {T} all, {T} x, int64 width, int64 k",
        "bool kept",
        "kept = slra_is_among(all, x, i, width, k)",
    ),
    "gather": Elementwise(
        REAL | COMPLEX,
        "raw bool kept, {T} x, int64 width, int64 k",
        "raw {T} values, raw int32 columns",
        """
        if (kept[i]) {{
            const long long place = slra_place(kept, i, width, k);
            values[place] = x;
            columns[place] = i % width;
        }}
        """,
    ),
    # Of long rows, see `cupy_select`.
    "digit_counts": Elementwise(
        REAL | COMPLEX,
        "{T} x, int64 bits, int64 shift, int64 width, int64 copies",
        "raw int32 counts",
        """
        const long long own = slra_bits(abs(x));
        if ((own >> shift >> 8) == (bits >> shift >> 8)) {{
            atomicAdd(&counts[(i / width * copies + i % copies) * 256 + (own >> shift & 255)], 1);
        }}
        """,
    ),
    "digit_chosen": Elementwise(
        WHOLE,
        "raw {T} counts, int64 bits, int64 left, int64 shift",
        "int64 new_bits, int64 new_left",
        """
        long long digit = 255, rest = left;
        while (digit > 0 && counts[i * 256 + digit] < rest) {{
            rest -= counts[i * 256 + digit--];
        }}
        new_bits = bits | digit << shift;
        new_left = rest;
        """,
    ),
    "chunk_counts": Elementwise(
        REAL | COMPLEX,
        "raw {T} x, int64 bits, int64 length, int64 n_chunks, int64 width",
        "int64 found",
        """
        const long long row = i / n_chunks, start = row * width + i % n_chunks * length;
        const long long stop = start + length, end = (row + 1) * width;
        found = slra_counted(x, start, stop < end ? stop : end, bits);
        """,
    ),
    "write_largest": Elementwise(
        REAL | COMPLEX,
        "raw {T} x, raw int64 sums, int64 found, int64 bits, int64 ties, int64 length, int64 n_chunks, int64 width, "
        "int64 k",
        "raw {T} values, raw int32 columns",
        """
        const long long row = i / n_chunks, start = row * width + i % n_chunks * length;
        const long long stop = start + length, end = (row + 1) * width;
        const long long before = sums[i] - found - (row > 0 ? sums[row * n_chunks - 1] : 0);
        slra_write_largest(
            x, values, columns, start, stop < end ? stop : end, row, width, k, bits, ties, before
        );
        """,
    ),
    "scatter": Elementwise(
        HALF | REAL | COMPLEX,
        "{T} x, int64 column, int64 width, int64 k",
        "raw {T} dense",
        "dense[i / k * width + column] = x",
    ),
    "gradients": Elementwise(
        REAL,
        "{T} product, {T} grad_weight, bool mask, " + _TILE + ", {T} lse, {T} delta",
        "{T} weight, {T} grad_score",
        _GRADIENTS,
    ),
    "biased_gradients": Elementwise(
        REAL,
        "{T} product, {T} grad_weight, {T} mask, " + _TILE + ", {T} lse, {T} delta",
        "{T} weight, {T} grad_score",
        _GRADIENTS,
    ),
}


def build(definition: Elementwise | Reduction, name: str, dtype: str, source: str = SOURCE) -> Any:
    """Make one kernel; nothing is compiled yet."""
    words = {
        "T": dtype,
        "R": definition.dtypes[dtype],
        "C": C_NAMES[definition.dtypes[dtype]],
        "U": C_NAMES[dtype],
        "W": "complex128" if dtype in COMPLEX else "float64",
        "X": "static_cast<float>(x)" if dtype in HALF else "x",
    }
    texts = definition._asdict()
    del texts["dtypes"]
    texts = {field: text.format(**words) for field, text in texts.items()}
    given = texts.pop("inputs"), texts.pop("outputs")
    options = {"name": f"slra_{name}_{dtype}", "preamble": source}
    if isinstance(definition, Elementwise):
        return cupy.ElementwiseKernel(*given, texts["operation"], **options)
    return cupy.ReductionKernel(
        *given,
        map_expr=texts["value"],
        reduce_expr=texts["combination"],
        post_map_expr=texts["result"],
        identity=texts["identity"],
        reduce_type=texts["kind"] or None,
        **options,
    )


KERNELS = {
    (name, dtype): build(definition, name, dtype)
    for name, definition in DEFINITIONS.items()
    for dtype in definition.dtypes
}


def kernel(name: str, like: Array) -> Any:
    """Return the kernel of this name for the dtype of ``like``."""
    return KERNELS[name, like.dtype.name]
