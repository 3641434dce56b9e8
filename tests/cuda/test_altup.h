/* Inputs of each layer, LAuReL's sum, sparse gates, AltUp. Part of test_kernels.cpp. */

static void joining_per_layer(void) {
    for (int dim : { 32, 100, 256 }) {
        const int n = 5, layers = 3, model = 192;
        const size_t stride = (size_t)(layers * dim + 15) / 16 * 16;
        std::vector<float> projected = noises(n * stride, 9), inputs = noises(n * stride),
                           w = noises((size_t)dim);
        const cuda_join a = { n, layers, dim, projected.data(), inputs.data(), stride, w.data(),
                              1.0f / sqrtf((float)model), sqrtf((float)dim), (float)sqrt(0.5), 1e-6f };
        const std::vector<float> before = projected;
        check(
            text("join_per_layer: %d values", dim), { out(inputs) },
            [&] { reference_join(&a, model), projected = before; },
            [&] { launch("join_per_layer", join_grid(&a), a), projected = before; });
    }
}

static void scaling_rows(void) {
    for (int dim : { 64, 100, 640 }) {
        const int n = 3;
        const size_t stride = (size_t)(dim + 15) / 16 * 16;
        std::vector<float> x = noises(n * stride), y = noises(n * stride), by = noises((size_t)dim);
        std::vector<act_block> act = blocks((size_t)((n + 1) * (dim / 32 + 1)));
        const cuda_scale_rows a = { n, dim, x.data(), by.data(), y.data(), stride, act.data(), n + 1 };
        check(
            text("scale_rows: %d values", dim), { out(y), out(act) }, [&] { reference_scale_rows(&a); },
            [&] { launch("scale_rows", scale_rows_grid(&a), a); });
    }
}

static void adding_normed_rows(void) {
    for (int dim : { 64, 100, 4128 })
        for (int add = 0; add < 2; add++) {
            const int n = 3;
            const size_t stride = (size_t)(dim + 15) / 16 * 16;
            std::vector<float> x = noises(n * stride), y = noises(n * stride), result = noises(n * stride),
                               w = noises((size_t)dim);
            const cuda_add_normed a = { n, dim, add, x.data(), y.data(), result.data(), stride, w.data(),
                                        add ? BMC_NORM_LAYER : BMC_NORM_RMS, 1e-6f };
            check(
                text("add_normed: %d values, add %d", dim, add), { out(y), out(result) },
                [&] { reference_add_normed(&a); }, [&] { launch("add_normed", add_normed_grid(&a), a); });
        }
}

/* Sparse gates, with one that is NaN and rows of one value; gates of what stands in rows of its own. */
static void gating(void) {
    for (int dim : { 1, 96, 300, 1000 })
        for (float sparsity : { 0.0f, 0.4f, 1.6448536f }) {
            const int n = 3;
            const size_t stride = (size_t)(dim + 15) / 16 * 16, x_stride = 3 * stride;
            std::vector<float> gate = noises(n * stride, 2), up = noises(n * stride),
                               x = noises(n * x_stride);
            std::vector<act_block> act = blocks((size_t)((n + 1) * (dim / 32 + 1)));
            if (dim > 96 && sparsity > 0)
                gate[7] = NAN, gate[stride + 1] = -0.0f;
            const cuda_thin thin = { n, dim, gate.data(), stride, sparsity };
            cuda_activate a = {};
            a.n_tok = n, a.dim = dim, a.kind = BMC_ACT_GELU, a.gate = gate.data();
            a.up = sparsity > 1 ? gate.data() : up.data();      /* per-layer inputs: in the gate's place */
            a.stride = a.gate_stride = stride, a.act = act.data(), a.act_stride = n + 1;
            a.x = dim == 300 ? x.data() + stride : up.data(), a.x_stride = dim == 300 ? x_stride : stride;
            check(
                text("thin_out, activate: %d values, sparsity %g", dim, (double)sparsity),
                { out(gate), out(up), out(act) }, [&] { reference_gate(&thin, &a); },
                [&] {
                    if (sparsity > 0)
                        launch("thin_out", thin_grid(&thin), thin);
                    launch("activate", activate_grid(&a), a);
                });
        }
}

static void altup_blocks(void) {
    static const struct { int kind; const char *kernel; } kinds[] = {
        { BMC_ALTUP_BEGIN, "altup_lengths" }, { BMC_ALTUP_PREDICT, "altup_predict" },
        { BMC_ALTUP_CORRECT, "altup_correct" }, { BMC_ALTUP_END, "altup_lengths" },
    };
    for (const auto &k : kinds)
        for (int dim : { 32, 320 })
            for (int mode = 0; mode < 4; mode++) {
                const int n = 3, versions = mode == 3 ? 8 : 2 + mode, others = versions - 1;
                const bool ends = k.kind == BMC_ALTUP_END, begins = k.kind == BMC_ALTUP_BEGIN;
                const size_t stride = (size_t)dim, wide = (size_t)((ends ? others : versions) * dim);
                std::vector<float> x = noises(n * stride, 3), rows = noises(n * wide),
                                   scores = noises(n * 16, 40), result = noises(n * stride),
                                   coef = noises((size_t)(versions * versions * versions));
                if (mode == 1)                      /* of no length */
                    for (int i = 0; i < dim; i++)
                        rows[(size_t)(begins ? dim : 0) + (size_t)i] = 0;
                cuda_altup a = {};
                a.n_tok = n, a.dim = dim, a.n = versions, a.add = mode & 1, a.sums = ends;
                a.x = x.data(), a.rows = rows.data() + (begins ? dim : 0), a.rows_stride = wide;
                a.out = mode == 3 ? x.data() : result.data(), a.stride = stride; /* 3: to x as it is */
                a.scores = scores.data(), a.scores_stride = 16, a.coef = coef.data(),
                a.by = 1.0f / (float)dim;
                check(
                    text("%s: kind %d, %d values, %d versions", k.kernel, k.kind, dim, versions),
                    { out(x), out(rows), out(result) }, [&] { reference_altup(k.kind, &a); },
                    [&] { launch(k.kernel, begins || ends ? altup_lengths_grid(&a) : altup_grid(&a), a); });
            }
}
