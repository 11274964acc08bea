#include "tests/op_table.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD_WORD = 0x5ca1ab1e };

const unsigned op_flags[4] = {0, OPEN_BF16, OPEN_GPU_FORMS, OPEN_GPU_FORMS | OPEN_BF16};
uint64_t op_launches[KERNEL_COUNT];

const char *op_flags_name(unsigned flags)
{
    static const char *names[] = {"f32", "bf16", "f32 gpu forms", "bf16 gpu forms"};
    return names[flags & 3];
}

struct op_doubles {
    struct op_doubles *next;
    double values[];
};

// ---- launches are counted by a backend that passes them on --------------------------------------

static struct backend counting;
static const struct backend *counted; // all devices of a run are of this one

static int counting_launch(struct stream *s, enum kernel kernel, const int groups[3],
                           const union arg *args, int count)
{
    op_launches[kernel]++;
    return counted->launch(s, kernel, groups, args, count);
}

static void count_launches(struct device *dev)
{
    if (dev->api == &counting)
        return;
    BUG_IF(counted && counted != dev->api);
    counted = dev->api;
    counting = *counted;
    counting.launch = counting_launch;
    dev->api = &counting;
}

// ---- begin and end ------------------------------------------------------------------------------

int op_begin(struct op_run *r, unsigned flags, uint64_t seed)
{
    memset(r, 0, sizeof *r);
    struct device *dev = test_device(flags);
    if (!dev)
        return -1;
    count_launches(dev);
    r->c.dev = dev;
    r->act = dev->act;
    r->state = seed * 0x9e3779b97f4a7c15u + flags + 1;
    return dev->api->stream_new(dev, &r->c.stream);
}

static int bad_guards(struct op_run *r, const struct operand *o);

static void free_operand(struct op_run *r, struct operand *o)
{
    r->c.dev->api->free(o->t.mem);
    r->c.dev->api->free(o->whole);
    free(o->v);
    free(o);
}

int op_end(struct op_run *r)
{
    while (r->operands) {
        struct operand *o = r->operands;
        r->operands = o->next;
        if (bad_guards(r, o)) {
            printf("    written outside of an operand of %lld values\n", (long long)o->count);
            r->failures++;
        }
        free_operand(r, o);
    }
    while (r->doubles) {
        struct op_doubles *d = r->doubles;
        r->doubles = d->next;
        free(d);
    }
    if (r->c.stream)
        r->c.dev->api->stream_free(r->c.stream);
    return r->failures ? FAILED : PASSED;
}

int op_for_all(op_case *body, const int shapes[][6], int count)
{
    int failed = 0;
    for (int f = 0; f < 4; f++)
        for (int i = 0; i < count; i++) {
            struct op_run r;
            OK(op_begin(&r, op_flags[f], (uint64_t)i + 1));
            if (body(&r, shapes[i]) != PASSED)
                r.failures++;
            failed += op_end(&r) != PASSED;
        }
    return failed ? FAILED : PASSED;
}

// ---- random numbers and host memory -------------------------------------------------------------

double op_uniform(struct op_run *r, double low, double high)
{
    uint64_t z = r->state += 0x9e3779b97f4a7c15u; // splitmix64
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return low + (high - low) * (double)(z >> 11) / 9007199254740992.0;
}

static void *must(void *p)
{
    if (!p)
        abort();
    return p;
}

double *op_doubles(struct op_run *r, int64_t count)
{
    struct op_doubles *d = must(calloc(1, sizeof *d + (size_t)count * sizeof(double)));
    d->next = r->doubles;
    r->doubles = d;
    return d->values;
}

// ---- storage ------------------------------------------------------------------------------------

static uint16_t to_bf16(double value)
{
    float f = (float)value;
    uint32_t u;
    memcpy(&u, &f, 4);
    if (isnan(f))
        return (uint16_t)(u >> 16 | 0x40);
    uint32_t low = u & 0xffff, high = u >> 16; // nearest, ties to even
    return (uint16_t)(high + (low > 0x8000 || (low == 0x8000 && (high & 1))));
}

static double from_bf16(uint16_t h)
{
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return (double)f;
}

static void store(enum dtype type, void *at, int64_t i, double value)
{
    if (type == F32)
        ((float *)at)[i] = (float)value;
    else if (type == BF16)
        ((uint16_t *)at)[i] = to_bf16(value);
    else if (type == I32)
        ((int32_t *)at)[i] = isnan(value) ? INT32_MIN : (int32_t)value;
    else
        ((int64_t *)at)[i] = isnan(value) ? INT64_MIN : (int64_t)value;
}

static double load(enum dtype type, const void *at, int64_t i)
{
    if (type == F32)
        return (double)((const float *)at)[i];
    if (type == BF16)
        return from_bf16(((const uint16_t *)at)[i]);
    return type == I32 ? (double)((const int32_t *)at)[i] : (double)((const int64_t *)at)[i];
}

static size_t guard_bytes(const struct op_run *r)
{
    size_t align = r->c.dev->info.align;
    return (1024 + align - 1) / align * align;
}

static size_t round_up(size_t bytes)
{
    return (bytes + 3) & ~(size_t)3;
}

static void must_do(int code)
{
    if (code < 0) {
        printf("    %s\n", error_message());
        abort();
    }
}

static struct operand *new_operand(struct op_run *r, enum dtype type, int ndim,
                                   const int64_t *shape)
{
    const struct backend *api = r->c.dev->api;
    struct operand *o = must(calloc(1, sizeof *o));
    BUG_IF(ndim > TENSOR_DIMS);
    o->t.dtype = type;
    o->t.ndim = ndim;
    memcpy(o->t.shape, shape, (size_t)ndim * sizeof *shape);
    o->count = tensor_count(&o->t);
    o->v = must(calloc((size_t)o->count, sizeof(double)));
    size_t bytes = tensor_bytes(&o->t), guard = guard_bytes(r);
    must_do(api->alloc(r->c.dev, round_up(bytes) + 2 * guard, &o->whole));
    must_do(api->fill(r->c.stream, o->whole, 0, round_up(bytes) + 2 * guard, GUARD_WORD));
    must_do(api->view(o->whole, guard, bytes, &o->t.mem));
    o->next = r->operands;
    r->operands = o;
    return o;
}

void op_rewrite(struct op_run *r, struct operand *o, const double *values)
{
    void *host = must(malloc(tensor_bytes(&o->t)));
    for (int64_t i = 0; i < o->count; i++) {
        store(o->t.dtype, host, i, values[i]);
        o->v[i] = load(o->t.dtype, host, i);
    }
    bool dry = r->c.dry;
    r->c.dry = false;
    must_do(tensor_write(&r->c, &o->t, host));
    r->c.dry = dry;
    free(host);
}

struct operand *op_values(struct op_run *r, enum dtype type, const double *values, int ndim,
                          const int64_t *shape)
{
    struct operand *o = new_operand(r, type, ndim, shape);
    op_rewrite(r, o, values);
    return o;
}

struct operand *op_random(struct op_run *r, enum dtype type, double low, double high, int ndim,
                          const int64_t *shape)
{
    struct operand *o = new_operand(r, type, ndim, shape);
    for (int64_t i = 0; i < o->count; i++)
        o->v[i] = op_uniform(r, low, high);
    op_rewrite(r, o, o->v);
    return o;
}

struct operand *op_output(struct op_run *r, enum dtype type, int ndim, const int64_t *shape)
{
    struct operand *o = new_operand(r, type, ndim, shape);
    for (int64_t i = 0; i < o->count; i++)
        o->v[i] = NAN;
    op_rewrite(r, o, o->v);
    return o;
}

int op_ready(struct op_run *r)
{
    size_t want = (r->c.space_wanted + 3) / 4;
    if (want == 0 || (r->space && (size_t)r->space->count >= want))
        return 0;
    r->space = op_output(r, F32, 1, (int64_t[]){(int64_t)want});
    r->c.space = r->space->t;
    return 0;
}

// ---- judging ------------------------------------------------------------------------------------

double op_tolerance(const struct op_run *r, double f32)
{
    return r->act == BF16 && f32 < 4e-3 ? 4e-3 : f32;
}

// Counts words of the guard bands that were changed.
static int bad_guards(struct op_run *r, const struct operand *o)
{
    size_t bytes = tensor_bytes(&o->t), guard = guard_bytes(r);
    size_t all = round_up(bytes) + 2 * guard;
    unsigned char *host = must(malloc(all));
    uint32_t word = GUARD_WORD;
    int bad = 0;
    must_do(r->c.dev->api->read(r->c.stream, o->whole, 0, host, all));
    for (size_t i = 0; i < all; i++)
        if (i < guard || i >= guard + bytes)
            bad += host[i] != ((unsigned char *)&word)[i % 4];
    free(host);
    return bad;
}

int op_read(struct op_run *r, struct operand *o)
{
    void *host = must(malloc(tensor_bytes(&o->t)));
    must_do(tensor_read(&r->c, &o->t, host));
    for (int64_t i = 0; i < o->count; i++)
        o->v[i] = load(o->t.dtype, host, i);
    free(host);
    return bad_guards(r, o);
}

static void complain(struct op_run *r, const struct operand *o, const char *format, va_list args)
{
    r->failures++;
    printf("    ");
    vprintf(format, args);
    printf(" [%s, %lld values]: ", op_flags_name(r->c.dev->flags), (long long)o->count);
}

void op_judge(struct op_run *r, struct operand *o, const double *want, double tolerance,
              const char *format, ...)
{
    double error = 0, scale = 0, worst = 0;
    int64_t where = 0;
    va_list args;
    int guards = op_read(r, o);
    for (int64_t i = 0; i < o->count; i++) {
        double d = fabs(o->v[i] - want[i]);
        error += d * d;
        scale += want[i] * want[i];
        if (!(d <= worst)) {
            worst = d;
            where = i;
        }
        if (isnan(d))
            break;
    }
    double rms = sqrt(scale / (double)o->count);
    double nrmse = sqrt(error / (double)o->count) / (rms > 0 ? rms : 1);
    if (guards == 0 && nrmse <= tolerance && worst <= 30 * tolerance * (rms > 0 ? rms : 1))
        return;
    va_start(args, format);
    complain(r, o, format, args);
    va_end(args);
    printf("nrmse %.2g, worst %.2g of rms %.2g at %lld: %.9g for %.9g, tolerance %.1g%s\n", nrmse,
           worst, rms, (long long)where, o->v[where], want[where], tolerance,
           guards ? ", GUARD BAND WRITTEN" : "");
}

void op_judge_exact(struct op_run *r, struct operand *o, const double *want, const char *format,
                    ...)
{
    int guards = op_read(r, o);
    int64_t bad = 0, where = 0;
    va_list args;
    for (int64_t i = o->count - 1; i >= 0; i--)
        if (o->v[i] != want[i]) {
            bad++;
            where = i;
        }
    if (bad == 0 && guards == 0)
        return;
    va_start(args, format);
    complain(r, o, format, args);
    va_end(args);
    printf("%lld values differ, first at %lld: %.9g for %.9g%s\n", (long long)bad, (long long)where,
           o->v[where], want[where], guards ? ", GUARD BAND WRITTEN" : "");
}

// ---- finite differences -------------------------------------------------------------------------

static double weighted(op_reference *f, const void *args, const double *x, const double *weight,
                       double *out, int outputs)
{
    double sum = 0;
    f(x, out, args);
    for (int i = 0; i < outputs; i++)
        sum += weight[i] * out[i];
    return sum;
}

double op_difference(op_reference *f, const void *args, double *x, int inputs, const double *weight,
                     int outputs, const double *analytic)
{
    double *out = must(calloc((size_t)outputs, sizeof *out));
    double worst = 0, squares = 0;
    for (int i = 0; i < inputs; i++) {
        // fourth-order central difference: error h^4, rounding 1e-16/h
        double at = x[i], h = 1e-3, s[4];
        const double step[4] = {-2, -1, 1, 2};
        for (int k = 0; k < 4; k++) {
            x[i] = at + h * step[k];
            s[k] = weighted(f, args, x, weight, out, outputs);
        }
        x[i] = at;
        double numeric = (8 * (s[2] - s[1]) - (s[3] - s[0])) / (12 * h);
        double d = fabs(numeric - analytic[i]);
        squares += numeric * numeric;
        if (!(d <= worst))
            worst = d;
    }
    free(out);
    double rms = sqrt(squares / inputs);
    return isnan(worst) ? 1e30 : rms > 0 ? worst / rms : worst;
}
