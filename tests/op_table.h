// Helpers for tests of single operations against double-precision references.
//
//     struct op_run r;
//     OK(op_begin(&r, flags, seed));
//     struct operand *x = op_random(&r, r.act, -1, 1, DIMS(rows, columns));
//     struct operand *y = op_output(&r, r.act, DIMS(rows, columns));
//     OK(OP_RUN(&r, op_silu_fwd(&r.c, &y->t, &x->t)));
//     double *want = op_doubles(&r, y->count);     // freed by op_end
//     ... fill want from x->v, which holds the inputs as stored (rounded to bf16 or f32) ...
//     op_judge(&r, y, want, op_tolerance(&r, 1e-6), "silu %d", rows);
//     return op_end(&r);                           // PASSED or FAILED
//
// Outputs start as NaN; every operand lies between two guard bands that are checked when it is
// judged and by op_end(). OP_RUN first runs the operation in a dry context, then provides the
// scratch it asked for (filled with NaN), then runs it.
#ifndef DITMOE_OP_TABLE_H
#define DITMOE_OP_TABLE_H

#include "runtime/ops.h"
#include "tests/test.h"

struct operand {
    struct tensor t;
    int64_t count;
    double *v;         // values as stored; outputs: as read back by op_read()
    struct mem *whole; // guard band, tensor, guard band
    struct operand *next;
};

struct op_run {
    struct context c;
    enum dtype act; // the device's activation type
    uint64_t state; // of op_uniform()
    struct operand *operands;
    struct operand *space;
    struct op_doubles *doubles;
    int failures;
};

// The flags values under which every operation is tested: CPU and GPU forms, f32 and bf16. 4 of
// them.
extern const unsigned op_flags[4];
const char *op_flags_name(unsigned flags);

int op_begin(struct op_run *r, unsigned flags, uint64_t seed); // 0 or a negative code
int op_end(struct op_run *r);                                  // frees; PASSED or FAILED

#define DIMS(...)                                                          \
    (int)(sizeof((int64_t[]){__VA_ARGS__}) / sizeof(int64_t)), (int64_t[]) \
    {                                                                      \
        __VA_ARGS__                                                        \
    }
// Operands; each aborts the test program when the device has no memory left.
struct operand *op_random(struct op_run *r, enum dtype type, double low, double high, int ndim,
                          const int64_t *shape);
struct operand *op_output(struct op_run *r, enum dtype type, int ndim, const int64_t *shape);
// Given values (rounded to the type; I32 exact).
struct operand *op_values(struct op_run *r, enum dtype type, const double *values, int ndim,
                          const int64_t *shape);
void op_rewrite(struct op_run *r, struct operand *o, const double *values);

double op_uniform(struct op_run *r, double low, double high); // the run's own random numbers
double *op_doubles(struct op_run *r, int64_t count);          // zeroed host memory

// Runs an operation: dry, then with the scratch it wanted.
int op_ready(struct op_run *r); // the step between: provides scratch
#define OP_RUN(r, call) \
    (((r)->c.dry = true, call) < 0 || op_ready(r) < 0 ? -1 : ((r)->c.dry = false, call))

// The f32 tolerance, or for bf16 storage the wider of it and 4e-3.
double op_tolerance(const struct op_run *r, double f32);

// Reads o back into o->v and checks its guard bands. Returns 0 or the number of faults.
int op_read(struct op_run *r, struct operand *o);
// op_read(), then compares with `want`: fails (counts in r->failures and prints) unless
// nrmse <= tolerance and max |difference| <= 30 * tolerance * rms(want). The text is printf's.
void op_judge(struct op_run *r, struct operand *o, const double *want, double tolerance,
              const char *format, ...) __attribute__((format(printf, 5, 6)));
// The same for integers: every one must be equal.
void op_judge_exact(struct op_run *r, struct operand *o, const double *want, const char *format,
                    ...) __attribute__((format(printf, 4, 5)));

// Proves a reference backward: the gradient of sum(weight * f(x)) with respect to x by central
// differences in double against `analytic`; `f` computes `outputs` values from x. Returns the
// largest |difference| / (rms of the numeric gradient), or a large number for NaN.
typedef void op_reference(const double *x, double *out, const void *args);
double op_difference(op_reference *f, const void *args, double *x, int inputs, const double *weight,
                     int outputs, const double *analytic);

// Runs `body` under each of op_flags for each shape, in an op_run of its own; PASSED or FAILED.
typedef int op_case(struct op_run *r, const int *shape);
int op_for_all(op_case *body, const int shapes[][6], int count);
#define OP_FOR_ALL(body, shapes) op_for_all(body, shapes, (int)(sizeof shapes / sizeof shapes[0]))

// How often each kernel was launched by operations under test, in this process.
extern uint64_t op_launches[KERNEL_COUNT];

#endif
