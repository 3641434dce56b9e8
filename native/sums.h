/* Sums over a row in double precision, the same on every machine: value i joins lane i % SUM_LANES in
 * ascending order, and the lanes are folded in halves. On a GPU a lane is a thread: cuda/altup.h. */
#ifndef SUMS_H
#define SUMS_H

enum { SUM_LANES = 256 };

static inline double fold_lanes(double *lane) {
    for (int half = SUM_LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return lane[0];
}

static inline double sum_values(const float *x, int n) {
    double lane[SUM_LANES] = { 0 };
    for (int i = 0; i < n; i += SUM_LANES)
        for (int j = 0; j < (n - i < SUM_LANES ? n - i : SUM_LANES); j++)
            lane[j] += x[i + j];
    return fold_lanes(lane);
}

/* Of (x - mean)^2. */
static inline double sum_squares(const float *x, int n, double mean) {
    double lane[SUM_LANES] = { 0 };
    for (int i = 0; i < n; i += SUM_LANES)
        for (int j = 0; j < (n - i < SUM_LANES ? n - i : SUM_LANES); j++)
            lane[j] += (x[i + j] - mean) * (x[i + j] - mean);
    return fold_lanes(lane);
}

#endif
