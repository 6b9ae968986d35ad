"""Separable filters in native code: a sum of them in one pass over the image, and only where the result is needed.

OpenCV filters once per separable term and always every row. Two thirds of all blurs here are followed by a reduction,
which throws most rows away.
"""

from __future__ import annotations

import numpy as np

from .native import inlined, native

TILE = 1600                                  # values of a row at a time: a handful of them fit the nearest cache


def interleaved(planes: np.ndarray) -> tuple[np.ndarray, bool]:
    """Planes (C, H, W) float32 in [0, 1] as an image in grey levels, (H, W, 3) or (H, W); and whether all are in range.

    One pass: reading a batch from memory costs as much as all noise.
    """
    if len(planes) == 1:
        return planes[0] * np.float32(255), bool(np.all((planes >= 0) & (planes <= 1)))
    image = np.empty((*planes.shape[1:], 3), np.float32)
    wrong = _interleave(*np.ascontiguousarray(planes).reshape(3, -1), image.reshape(-1))
    return image, not wrong


@native
def _interleave(red, green, blue, out):
    wrong = 0
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        wrong |= 1 - (r >= 0) * (r <= 1) * (g >= 0) * (g <= 1) * (b >= 0) * (b <= 1)       # also of NaN
        out[3 * i] = r * np.float32(255)
        out[3 * i + 1] = g * np.float32(255)
        out[3 * i + 2] = b * np.float32(255)
    return wrong


def filtered(image: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Correlation with the sum of outer products of columns (R, K) and rows (R, K), borders reflected (101).

    Image (H, W) or (H, W, C) float32; the result has its shape.
    """
    first = np.arange(len(image)) - columns.shape[1] // 2
    return _run(image, first, columns[:, None], rows)


def filtered_rows(image: np.ndarray, columns: np.ndarray, rows: np.ndarray, places: np.ndarray, weights: np.ndarray
                  ) -> np.ndarray:
    """Filters, and resamples the rows: row y of the result is the sum of weights[y, t] times row places[y, t].

    Places and weights are (h, T); the result has h rows.
    """
    low = places.min(1)
    spread = np.zeros((len(low), int((places.max(1) - low).max()) + 1), np.float32)
    for tap in range(places.shape[1]):
        spread[np.arange(len(low)), places[:, tap] - low] += weights[:, tap]
    taps = columns.shape[1]
    composed = np.zeros((len(columns), len(low), spread.shape[1] + taps - 1), np.float32)
    for shift in range(spread.shape[1]):
        composed[:, :, shift:shift + taps] += spread[:, shift, None] * columns[:, None]
    return _run(image, low - taps // 2, composed, rows)


def resized(image: np.ndarray, rows: tuple[np.ndarray, np.ndarray], columns: tuple[np.ndarray, np.ndarray]
            ) -> np.ndarray:
    """Every pixel as the weighted sum of others: places and weights, (h, T) for the rows and (w, T) for the columns."""
    planes = np.ascontiguousarray(image).reshape(*image.shape[:2], -1)
    out = np.empty((len(rows[0]), len(columns[0]), planes.shape[2]), np.float32)
    _resize(planes, *rows, *columns, out)
    return out.reshape(*out.shape[:2], *image.shape[2:])


def _run(image: np.ndarray, first: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    planes = np.ascontiguousarray(image).reshape(*image.shape[:2], -1)
    out = np.empty((len(first), *planes.shape[1:]), np.float32)
    _correlate(planes, first, _even(columns), _even(rows), out)
    return out.reshape(len(first), *image.shape[1:])


def _even(lines: np.ndarray) -> np.ndarray:
    """With a zero at the end where that fills a group of four."""
    width = [(0, 0)] * (lines.ndim - 1) + [(0, 1)]
    return np.ascontiguousarray(np.pad(lines, width) if lines.shape[-1] % 4 == 3 else lines, np.float32)


@inlined
def _reflected(place, count):
    if 0 <= place < count:
        return place
    if count == 1:
        return 0
    place %= 2 * (count - 1)
    return min(place, 2 * (count - 1) - place)


@native
def _add(out, base, starts, weights, count):
    """out += the sum over k of weights[k] times `count` values of base from starts[k]: eight at a time in registers."""
    k = 0
    while k + 8 <= len(weights):
        a, b, c, d, e, f, g, h = (base[starts[k]:], base[starts[k + 1]:], base[starts[k + 2]:], base[starts[k + 3]:],
                                  base[starts[k + 4]:], base[starts[k + 5]:], base[starts[k + 6]:],
                                  base[starts[k + 7]:])
        wa, wb, wc, wd = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        we, wf, wg, wh = weights[k + 4], weights[k + 5], weights[k + 6], weights[k + 7]
        for x in range(count):
            out[x] += (wa * a[x] + wb * b[x] + wc * c[x] + wd * d[x]) + (we * e[x] + wf * f[x] + wg * g[x] + wh * h[x])
        k += 8
    while k + 4 <= len(weights):
        a, b, c, d = base[starts[k]:], base[starts[k + 1]:], base[starts[k + 2]:], base[starts[k + 3]:]
        wa, wb, wc, wd = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        for x in range(count):
            out[x] += wa * a[x] + wb * b[x] + wc * c[x] + wd * d[x]
        k += 4
    while k < len(weights):
        a, wa = base[starts[k]:], weights[k]
        for x in range(count):
            out[x] += wa * a[x]
        k += 1


@inlined
def _mirror(line, origin, start, stop, width, channels):
    """Fills the pixels from start to stop of a line that begins at `origin`, all beyond the image, by reflection."""
    for place in range(start, stop):
        source = (_reflected(place, width) - origin) * channels
        for c in range(channels):
            line[(place - origin) * channels + c] = line[source + c]


@native
def _correlate(image, first, columns, rows, out):
    """out[y] = sum over r of rows[r] along the line that columns[r, y] makes of the image's rows from first[y] on."""
    height, width, channels = image.shape
    high, wide = columns.shape[2], rows.shape[1]
    reach = (wide - 1) // 2 if wide % 2 else wide // 2 - 1        # an even line ends in a zero
    base = image.reshape(height * width * channels)
    flat = out.reshape(len(out), width * channels)
    tile = max(1, TILE // channels)
    line = np.zeros((tile + wide) * channels, np.float32)
    starts = np.empty(high, np.int64)
    steps = np.arange(wide) * channels
    for left in range(0, width, tile):
        count = min(tile, width - left)
        begin, end = max(0, left - reach), min(width, left + count + reach)
        inner = line[(begin - left + reach) * channels:]
        values = (end - begin) * channels
        for y in range(len(out)):
            target = flat[y, left * channels:]
            for x in range(count * channels):
                target[x] = 0
            for k in range(high):
                starts[k] = (_reflected(first[y] + k, height) * width + begin) * channels
            for r in range(len(columns)):
                for x in range(values):
                    inner[x] = 0
                _add(inner, base, starts, columns[r, min(y, columns.shape[1] - 1)], values)
                _mirror(line, left - reach, left - reach, begin, width, channels)
                _mirror(line, left - reach, end, left + count + reach, width, channels)
                _add(target, line, steps, rows[r], count * channels)


@native
def _resize(image, places_y, weights_y, places_x, weights_x, out):
    height, width, channels = image.shape
    base, line = image.reshape(height * width * channels), np.empty(width * channels, np.float32)
    for y in range(len(out)):
        for x in range(len(line)):
            line[x] = 0
        _add(line, base, places_y[y] * (width * channels), weights_y[y], len(line))
        for x in range(out.shape[1]):
            for c in range(channels):
                total = np.float32(0)
                for tap in range(weights_x.shape[1]):
                    total += weights_x[x, tap] * line[places_x[x, tap] * channels + c]
                out[y, x, c] = total
