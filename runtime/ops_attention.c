// Attention, and the LayerNorm of q and k. The block sizes of the CPU forms are chosen here so that
// an item's private memory (ARENA_FWD, ARENA_BWD in kernels.cl) holds them.
#include "runtime/ops_internal.h"

#include <math.h>

enum {
    HEAD_MAX = 128,    // largest head size the kernels hold
    ARENA_FWD = 57344, // floats, as in kernels.cl
    ARENA_BWD = 65536,
    TILE = 64, // rows a group of the GPU forms; columns of a head that attention_fwd takes
};

static int64_t round_up(int64_t count, int64_t multiple)
{
    return cover(count, multiple) * multiple;
}

// Splits `count` into even blocks of a multiple of `multiple`, none above `most`.
static int64_t even_block(int64_t count, int64_t most, int64_t multiple)
{
    return round_up(cover(count, cover(count, most)), multiple);
}

struct attention_shape {
    int64_t images, heads, tokens, hd, all_heads, ld;
    float scale;
};

static struct attention_shape attention_shape(const struct context *c, const struct tensor *qkv,
                                              const struct tensor *o, int images, int heads)
{
    struct attention_shape s = {.images = images, .heads = heads};
    int64_t rows = qkv->shape[0], width = qkv->shape[1] / 3;
    BUG_IF(images < 1 || heads < 1 || rows % images || width % heads);
    BUG_IF(!is_act(c, qkv) || !has_shape2(qkv, rows, 3 * width));
    BUG_IF(!is_act(c, o) || !has_shape2(o, rows, width));
    s.tokens = rows / images;
    s.hd = width / heads;
    s.all_heads = (int64_t)images * heads;
    s.ld = round_up(s.hd, 16);
    s.scale = 1.0f / sqrtf((float)s.hd);
    BUG_IF(s.hd > HEAD_MAX);
    return s;
}

// Heads an item of a CPU form takes, so that short sequences do not drown in launches.
static int64_t heads_per_item(const struct context *c, const struct attention_shape *s)
{
    int64_t most = cover(128 * 128, s->tokens * s->tokens);
    return op_chunk(c, s->all_heads, 1, most);
}

struct blocks {
    int64_t key, query;
};

static struct blocks blocks_fwd(const struct context *c, const struct attention_shape *s)
{
    struct blocks b;
    b.query = even_block(s->tokens, s->hd > 64 ? 128 : 256, 8);
    // few heads: more, smaller blocks of queries, so that every compute unit has some
    int64_t wanted = cover(4 * (int64_t)c->dev->info.compute_units, s->all_heads);
    if (cover(s->tokens, b.query) < wanted)
        b.query =
            even_block(s->tokens, cover(s->tokens, wanted) < 32 ? 32 : cover(s->tokens, wanted), 8);
    int64_t left = ARENA_FWD - b.query * (2 * s->ld + 2);
    b.key = even_block(s->tokens, left / (2 * s->ld + 8) / 16 * 16, 16);
    BUG_IF(b.key * (2 * s->ld + 8) > left);
    return b;
}

int op_attention_fwd(struct context *c, struct tensor *o, struct tensor *lse,
                     const struct tensor *qkv, int images, int heads)
{
    struct attention_shape s = attention_shape(c, qkv, o, images, heads);
    BUG_IF(lse && (lse->dtype != F32 || tensor_count(lse) != s.all_heads * s.tokens));
    struct blocks b = blocks_fwd(c, &s);
    int64_t per = heads_per_item(c, &s);
    const union arg args[] = {BUF(o),           BUF_OR_NULL(lse), BUF(qkv),       INT(heads),
                              INT(s.tokens),    INT(s.hd),        FLOAT(s.scale), INT(lse != NULL),
                              INT(s.all_heads), INT(b.key),       INT(b.query),   INT(per)};
    const int count = (int)(sizeof args / sizeof args[0]);
    if (c->dry)
        return 0;
    int code = ACCELERATE(c, ACCELERATE_ATTENTION_FWD, args, o, lse, qkv);
    if (code != NOT_MINE)
        return code;
    if (c->dev->cpu_forms)
        return op_launch(c, KERNEL_attention_fwd_cpu, cover(s.tokens, b.query),
                         cover(s.all_heads, per), 1, args, count);
    return op_launch(c, s.hd > TILE ? KERNEL_attention_wide_fwd : KERNEL_attention_fwd,
                     cover(s.tokens, TILE), s.all_heads, 1, args, count);
}

static struct blocks blocks_bwd(const struct attention_shape *s)
{
    struct blocks b;
    b.query = even_block(s->tokens, 64, 8);
    int64_t left = ARENA_BWD - b.query * (3 * s->ld + 1);
    int64_t most = left / (5 * s->ld + 2 * b.query) / 16 * 16;
    b.key = even_block(s->tokens, most < 256 ? most : 256, 16);
    BUG_IF(b.key * (5 * s->ld + 2 * b.query) > left);
    return b;
}

static int attention_bwd_cpu(struct context *c, struct tensor *dqkv, struct tensor *delta,
                             const struct tensor *dout, const struct tensor *o,
                             const struct tensor *lse, const struct tensor *qkv,
                             const struct attention_shape *s)
{
    struct blocks b = blocks_bwd(s);
    int64_t per = heads_per_item(c, s);
    if (b.key < s->tokens) // dq is summed over blocks of keys
        op_want_space(c, (size_t)(s->all_heads * round_up(s->tokens, b.query) * s->ld) *
                             sizeof(float));
    const struct tensor *space = b.key < s->tokens ? &c->space : delta;
    return LAUNCH(c, KERNEL_attention_bwd_cpu, cover(s->all_heads, per), 1, 1, BUF(dqkv),
                  BUF(delta), BUF(dout), BUF(o), BUF(lse), BUF(qkv), BUF(space), INT(s->heads),
                  INT(s->tokens), INT(s->hd), FLOAT(s->scale), INT(s->all_heads), INT(b.key),
                  INT(b.query), INT(per));
}

static int attention_bwd_gpu(struct context *c, struct tensor *dqkv, struct tensor *delta,
                             const struct tensor *dout, const struct tensor *o,
                             const struct tensor *lse, const struct tensor *qkv,
                             const struct attention_shape *s)
{
    int64_t count = s->all_heads * s->tokens, tiles = cover(s->tokens, TILE);
    TRY(LAUNCH(c, KERNEL_attention_delta, cover(count, 64), 1, 1, BUF(delta), BUF(dout), BUF(o),
               INT(s->heads), INT(s->tokens), INT(s->hd), UINT(count)));
    TRY(LAUNCH(c, KERNEL_attention_bwd_kv, tiles, s->all_heads, 1, BUF(dqkv), BUF(delta), BUF(dout),
               BUF(lse), BUF(qkv), INT(s->heads), INT(s->tokens), INT(s->hd), FLOAT(s->scale)));
    return LAUNCH(c, KERNEL_attention_bwd_q, tiles, s->all_heads, 1, BUF(dqkv), BUF(delta),
                  BUF(dout), BUF(lse), BUF(qkv), INT(s->heads), INT(s->tokens), INT(s->hd),
                  FLOAT(s->scale));
}

int op_attention_bwd(struct context *c, struct tensor *dqkv, struct tensor *delta,
                     const struct tensor *dout, const struct tensor *o, const struct tensor *lse,
                     const struct tensor *qkv, int images, int heads)
{
    struct attention_shape s = attention_shape(c, qkv, o, images, heads);
    int64_t rows = s.all_heads * s.tokens;
    BUG_IF(!is_act(c, dqkv) || tensor_count(dqkv) != tensor_count(qkv));
    BUG_IF(!is_act(c, dout) || tensor_count(dout) != tensor_count(o));
    BUG_IF(delta->dtype != F32 || tensor_count(delta) != rows);
    BUG_IF(lse->dtype != F32 || tensor_count(lse) != rows);
    const union arg args[] = {BUF(dqkv),     BUF(delta), BUF(dout),     BUF(o),
                              BUF(lse),      BUF(qkv),   INT(images),   INT(s.heads),
                              INT(s.tokens), INT(s.hd),  FLOAT(s.scale)};
    int code = ACCELERATE(c, ACCELERATE_ATTENTION_BWD, args, dqkv, delta, dout, o, lse, qkv);
    if (code != NOT_MINE)
        return code;
    return c->dev->cpu_forms ? attention_bwd_cpu(c, dqkv, delta, dout, o, lse, qkv, &s)
                             : attention_bwd_gpu(c, dqkv, delta, dout, o, lse, qkv, &s);
}

// ---- LayerNorm of q and k -----------------------------------------------------------------------

// Checks the shapes; returns the head size.
static int64_t qk_head(const struct context *c, const struct tensor *qkv,
                       const struct tensor *stats, const struct tensor *const parameters[4],
                       int heads)
{
    BUG_IF(qkv->ndim != 2 || !is_act(c, qkv) || heads < 1 || qkv->shape[1] % (3 * heads));
    BUG_IF(stats->dtype != F32 || tensor_count(stats) != qkv->shape[0] * heads * 4);
    int64_t hd = qkv->shape[1] / (3 * heads);
    BUG_IF(hd > HEAD_MAX);
    for (int i = 0; i < 4; i++)
        BUG_IF(parameters[i]->dtype != F32 || tensor_count(parameters[i]) != hd);
    return hd;
}

int op_qk_norm_fwd(struct context *c, struct tensor *out, struct tensor *stats,
                   const struct tensor *qkv, const struct tensor *wq, const struct tensor *bq,
                   const struct tensor *wk, const struct tensor *bk, int heads)
{
    int64_t rows = qkv->shape[0];
    int64_t hd = qk_head(c, qkv, stats, (const struct tensor *const[]){wq, bq, wk, bk}, heads);
    BUG_IF(!is_act(c, out) || !has_shape2(out, rows, qkv->shape[1]));
    const struct qk_norm args = {.out = out->mem,
                                 .qkv = qkv->mem,
                                 .stats = stats->mem,
                                 .wq = wq->mem,
                                 .bq = bq->mem,
                                 .wk = wk->mem,
                                 .bk = bk->mem,
                                 .rows = arg_int(rows),
                                 .heads = heads,
                                 .head = arg_int(hd)};
    int code = ACCELERATE(c, ACCELERATE_QK_NORM_FWD, &args, out, qkv, stats, wq, bq, wk, bk);
    if (code != NOT_MINE)
        return code;
    int64_t chunk = op_chunk(c, rows, 1, 64);
    int64_t groups = c->dev->cpu_forms ? cover(rows, chunk) : cover(rows * 3 * heads, 16);
    return LAUNCH(c, FORM(c, qk_norm_fwd), groups, 1, 1, BUF(out), BUF(stats), BUF(qkv), BUF(wq),
                  BUF(bq), BUF(wk), BUF(bk), INT(heads), INT(hd), INT(rows), INT(chunk),
                  INT(c->dry || out->mem != qkv->mem));
}

int op_qk_attention_fwd(struct context *c, struct tensor *o, struct tensor *lse, struct tensor *qk,
                        struct tensor *stats, const struct tensor *qkv, const struct tensor *wq,
                        const struct tensor *bq, const struct tensor *wk, const struct tensor *bk,
                        int images, int heads)
{
    struct attention_shape s = attention_shape(c, qkv, o, images, heads);
    BUG_IF(lse && (lse->dtype != F32 || tensor_count(lse) != s.all_heads * s.tokens));
    BUG_IF(qk_head(c, qkv, stats, (const struct tensor *const[]){wq, bq, wk, bk}, heads) != s.hd);
    const struct qk_attention args = {.o = o->mem,
                                      .lse = lse ? lse->mem : NULL,
                                      .qkv = qkv->mem,
                                      .wq = wq->mem,
                                      .bq = bq->mem,
                                      .wk = wk->mem,
                                      .bk = bk->mem,
                                      .images = images,
                                      .heads = heads,
                                      .tokens = arg_int(s.tokens),
                                      .head = arg_int(s.hd),
                                      .scale = s.scale};
    int code = ACCELERATE(c, ACCELERATE_QK_ATTENTION_FWD, &args, o, lse, qkv, wq, bq, wk, bk);
    if (code != NOT_MINE)
        return code;
    TRY(op_qk_norm_fwd(c, qk, stats, qkv, wq, bq, wk, bk, heads));
    return op_attention_fwd(c, o, lse, qk, images, heads);
}

int op_qk_norm_bwd(struct context *c, struct tensor *dqkv, struct tensor *dwq, struct tensor *dbq,
                   struct tensor *dwk, struct tensor *dbk, const struct tensor *qkv,
                   const struct tensor *stats, const struct tensor *wq, const struct tensor *wk,
                   int heads)
{
    int64_t rows = qkv->shape[0];
    int64_t hd = qk_head(c, qkv, stats, (const struct tensor *const[]){dwq, dbq, dwk, dbk}, heads);
    BUG_IF(tensor_count(wq) != hd || tensor_count(wk) != hd || wq->dtype != F32 ||
           wk->dtype != F32);
    BUG_IF(!is_act(c, dqkv) || !has_shape2(dqkv, rows, qkv->shape[1]));
    if (c->dev->fused_width > 0)
        op_want_space(c, (size_t)(cover(rows, QK_PART) * 4 * hd) * sizeof(float));
    const struct qk_norm args = {.out = dqkv->mem,
                                 .qkv = qkv->mem,
                                 .stats = stats->mem,
                                 .wq = wq->mem,
                                 .wk = wk->mem,
                                 .dwq = dwq->mem,
                                 .dbq = dbq->mem,
                                 .dwk = dwk->mem,
                                 .dbk = dbk->mem,
                                 .partial = c->space.mem,
                                 .rows = arg_int(rows),
                                 .heads = heads,
                                 .head = arg_int(hd)};
    int code =
        ACCELERATE(c, ACCELERATE_QK_NORM_BWD, &args, dqkv, dwq, dbq, dwk, dbk, qkv, stats, wq, wk);
    if (code != NOT_MINE)
        return code;
    int64_t chunk = op_chunk(c, rows, 8, c->dev->cpu_forms ? 256 : 32), chunks = cover(rows, chunk);
    op_want_space(c, (size_t)(chunks * 4 * hd) * sizeof(float));
    TRY(LAUNCH(c, FORM(c, qk_norm_bwd), chunks, 1, 1, BUF(dqkv), BUF(&c->space), BUF(qkv),
               BUF(stats), BUF(wq), BUF(wk), INT(heads), INT(hd), INT(rows), INT(chunk)));
    return LAUNCH(c, KERNEL_qk_norm_sum, cover(4 * hd, 64), 1, 1, BUF(dwq), BUF(dbq), BUF(dwk),
                  BUF(dbk), BUF(&c->space), INT(hd), INT(chunks));
}
