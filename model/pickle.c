// Reading pickles; see pickle.h.
#include "model/pickle.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNK = 1 << 16 };

struct chunk {
    struct chunk *next;
    size_t used, size;
    _Alignas(8) char bytes[];
};

struct pickle {
    const uint8_t *data;
    size_t size, at;
    size_t spent; // bytes of memory
    struct chunk *chunks;
    struct pickle_value **stack; // NULL: a mark
    size_t depth, stack_room;
    struct pickle_value **memo;
    size_t memo_count, memo_room;
    struct pickle_value **storages;
    size_t storage_count, storage_room;
    struct pickle_value *root;
};

typedef struct pickle_value value;

// ---- globals ------------------------------------------------------------------------------------

enum meaning {
    G_TENSOR,    // _rebuild_tensor_v2(storage, offset, sizes, strides, ...)
    G_PARAMETER, // _rebuild_parameter(tensor, ...)
    G_TYPED,     // _rebuild_from_type_v2(function, type, arguments, state)
    G_ORDERED,   // an empty dict
    G_FIRST,     // what its first argument is: torch.Size of a tuple, an enum of a number
    G_OTHER,     // of no use here
    G_STORAGE,
};

#define OTHER(module, name)         \
    {                               \
        module, name, G_OTHER, 0, 0 \
    }
#define STORAGE(name, dtype, element)            \
    {                                            \
        "torch", name, G_STORAGE, dtype, element \
    }
static const struct {
    const char *module, *name;
    enum meaning meaning;
    int dtype; // G_STORAGE: st_dtype, or -1
    size_t element;
} globals[] = {
    {"torch._utils", "_rebuild_tensor_v2", G_TENSOR, 0, 0},
    {"torch._utils", "_rebuild_parameter", G_PARAMETER, 0, 0},
    {"torch._tensor", "_rebuild_from_type_v2", G_TYPED, 0, 0},
    {"collections", "OrderedDict", G_ORDERED, 0, 0},
    {"collections", "defaultdict", G_ORDERED, 0, 0},
    {"torch", "Size", G_FIRST, 0, 0},
    {"deepspeed.runtime.zero.config", "ZeroStageEnum", G_FIRST, 0, 0},
    OTHER("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    OTHER("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    OTHER("deepspeed.utils.tensor_fragment", "fragment_address"),
    OTHER("argparse", "Namespace"),
    OTHER("pathlib", "PosixPath"),
    OTHER("__builtin__", "set"),
    OTHER("__builtin__", "dict"),
    OTHER("__builtin__", "list"),
    OTHER("__builtin__", "int"),
    OTHER("__builtin__", "bytearray"),
    OTHER("builtins", "set"),
    OTHER("numpy.core.multiarray", "scalar"),
    OTHER("numpy._core.multiarray", "scalar"),
    OTHER("numpy.core.multiarray", "_reconstruct"),
    OTHER("numpy._core.multiarray", "_reconstruct"),
    OTHER("numpy", "ndarray"),
    OTHER("numpy", "dtype"),
    OTHER("_codecs", "encode"),
    OTHER("torch", "Tensor"),
    OTHER("torch.nn.parameter", "Parameter"),
    OTHER("torch", "device"),
    OTHER("torch", "float32"),
    OTHER("torch", "float16"),
    OTHER("torch", "bfloat16"),
    OTHER("torch", "float64"),
    OTHER("torch", "int64"),
    OTHER("torch", "int32"),
    STORAGE("FloatStorage", ST_F32, 4),
    STORAGE("HalfStorage", ST_F16, 2),
    STORAGE("BFloat16Storage", ST_BF16, 2),
    STORAGE("DoubleStorage", ST_F64, 8),
    STORAGE("IntStorage", ST_I32, 4),
    STORAGE("LongStorage", ST_I64, 8),
    STORAGE("ByteStorage", ST_U8, 1),
    STORAGE("CharStorage", -1, 1),
    STORAGE("ShortStorage", -1, 2),
    STORAGE("BoolStorage", -1, 1),
    STORAGE("ComplexFloatStorage", -1, 8),
    STORAGE("ComplexDoubleStorage", -1, 16),
};
#undef OTHER
#undef STORAGE

static bool is_text(const char *s, size_t length, const char *want)
{
    return strlen(want) == length && !memcmp(s, want, length);
}

// ---- memory -------------------------------------------------------------------------------------

static int bad(const struct pickle *p, const char *what)
{
    return fail(ERR_INPUT, "pickle byte %zu: %s", p->at, what);
}

// Every allocation is counted here first.
static int spend(struct pickle *p, size_t bytes)
{
    p->spent += bytes;
    if (p->spent > PICKLE_SLACK + PICKLE_FACTOR * p->size)
        return bad(p, "wants more memory than values of tensors do");
    return 0;
}

static int take(struct pickle *p, size_t bytes, void **out)
{
    *out = NULL;
    bytes = (bytes + 7) & ~(size_t)7;
    struct chunk *c = p->chunks;
    if (!c || c->size - c->used < bytes) {
        const size_t size = bytes > CHUNK ? bytes : CHUNK;
        TRY(spend(p, size));
        c = malloc(sizeof *c + size);
        if (!c)
            return fail(ERR_NOMEM, "out of memory for a pickle");
        *c = (struct chunk){.next = p->chunks, .size = size};
        p->chunks = c;
    }
    *out = c->bytes + c->used;
    c->used += bytes;
    return 0;
}

// Room for one more pointer in a growing array of them.
static int grow(struct pickle *p, value ***list, size_t count, size_t *room)
{
    if (count < *room)
        return 0;
    const size_t wider = *room ? 2 * *room : 256;
    TRY(spend(p, (wider - *room) * sizeof **list));
    value **new = realloc(*list, wider * sizeof *new);
    if (!new)
        return fail(ERR_NOMEM, "out of memory for a pickle");
    *list = new;
    *room = wider;
    return 0;
}

static int push(struct pickle *p, value *v)
{
    TRY(grow(p, &p->stack, p->depth, &p->stack_room));
    p->stack[p->depth++] = v;
    return 0;
}

static int push_value(struct pickle *p, value v)
{
    void *new;
    TRY(take(p, sizeof(value), &new));
    *(value *)new = v;
    return push(p, new);
}

// Values without contents are never changed: one of each does for all.
static value none = {.kind = PICKLE_NONE}, other = {.kind = PICKLE_OTHER},
             nothing = {.kind = PICKLE_TUPLE},
             truth[2] = {{.kind = PICKLE_INT, .i = 0}, {.kind = PICKLE_INT, .i = 1}};

static int pop(struct pickle *p, value **out)
{
    *out = NULL;
    if (!p->depth || !p->stack[p->depth - 1])
        return bad(p, "takes from an empty stack");
    *out = p->stack[--p->depth];
    return 0;
}

static int top(struct pickle *p, enum pickle_kind kind, value **out)
{
    *out = NULL;
    if (!p->depth || !p->stack[p->depth - 1] || p->stack[p->depth - 1]->kind != kind)
        return bad(p, "fills something that is no list or dict");
    *out = p->stack[p->depth - 1];
    return 0;
}

// The stack position of the last mark; what is above it is `*count` values.
static int find_mark(struct pickle *p, size_t *mark, size_t *count)
{
    size_t i = p->depth;
    *mark = *count = 0;
    while (i > 0 && p->stack[i - 1])
        i--;
    if (!i)
        return bad(p, "has no mark on the stack");
    *mark = i - 1;
    *count = p->depth - i;
    return 0;
}

static int append(struct pickle *p, value *list, value *const *items, size_t count)
{
    if (count > list->room - list->count) {
        // a tuple has all its items at once
        const size_t all = list->count + count, room = list->kind == PICKLE_TUPLE ? all : 2 * all;
        void *wider;
        TRY(take(p, room * sizeof *list->items, &wider));
        if (list->count)
            memcpy(wider, list->items, list->count * sizeof *list->items);
        list->items = wider;
        list->room = (uint32_t)room;
    }
    if (count)
        memcpy(list->items + list->count, items, count * sizeof *items);
    list->count += (uint32_t)count;
    return 0;
}

// ---- arguments of opcodes -----------------------------------------------------------------------

static int need(const struct pickle *p, uint64_t bytes)
{
    return bytes <= p->size - p->at ? 0 : bad(p, "ends too early: the file is cut short");
}

static int read_uint(struct pickle *p, int bytes, uint64_t *out)
{
    *out = 0;
    TRY(need(p, (uint64_t)bytes));
    for (int i = 0; i < bytes; i++)
        *out |= (uint64_t)p->data[p->at++] << 8 * i;
    return 0;
}

static int read_text(struct pickle *p, int length_bytes)
{
    uint64_t length;
    TRY(read_uint(p, length_bytes, &length));
    TRY(need(p, length));
    value v = {.kind = PICKLE_TEXT};
    v.text = (const char *)p->data + p->at;
    v.count = (uint32_t)length;
    p->at += (size_t)length;
    return push_value(p, v);
}

static int read_int(struct pickle *p, int bytes)
{
    uint64_t n;
    TRY(read_uint(p, bytes, &n));
    return push_value(p, (value){.kind = PICKLE_INT, .i = bytes == 4 ? (int32_t)n : (int64_t)n});
}

// Integers of more than 64 bits are seeds and the like, of no use here.
static int read_long(struct pickle *p)
{
    uint64_t length, n = 0;
    TRY(read_uint(p, 1, &length));
    TRY(need(p, length));
    if (length > 8) {
        p->at += length;
        return push(p, &other);
    }
    if (length && p->data[p->at + length - 1] & 0x80)
        n = UINT64_MAX;
    for (uint64_t i = 0; i < length; i++) {
        n &= ~((uint64_t)0xff << 8 * i);
        n |= (uint64_t)p->data[p->at++] << 8 * i;
    }
    return push_value(p, (value){.kind = PICKLE_INT, .i = (int64_t)n});
}

static int read_float(struct pickle *p)
{
    TRY(need(p, 8));
    uint64_t bits = 0;
    for (int i = 0; i < 8; i++)
        bits = bits << 8 | p->data[p->at++];
    value v = {.kind = PICKLE_FLOAT};
    memcpy(&v.f, &bits, sizeof bits);
    return push_value(p, v);
}

static int read_line(struct pickle *p, const char **text, size_t *length)
{
    *text = NULL;
    *length = 0;
    const uint8_t *from = p->data + p->at, *end = memchr(from, '\n', p->size - p->at);
    if (!end)
        return bad(p, "ends too early: the file is cut short");
    *text = (const char *)from;
    *length = (size_t)(end - from);
    p->at += *length + 1;
    return 0;
}

// ---- globals and what they build ----------------------------------------------------------------

// Keeps a message a line, whatever bytes a file has for a name.
static void show(char *to, size_t size, const char *text, size_t length)
{
    size_t n = 0;
    for (; n < length && n < size - 1; n++)
        to[n] = text[n] > 32 && text[n] < 127 ? text[n] : '?';
    to[n] = 0;
}

static int push_global(struct pickle *p, const char *module, size_t module_length, const char *name,
                       size_t length)
{
    for (size_t i = 0; i < sizeof globals / sizeof *globals; i++)
        if (is_text(module, module_length, globals[i].module) &&
            is_text(name, length, globals[i].name))
            return push_value(p, (value){.kind = PICKLE_GLOBAL, .global = (uint8_t)i});
    char shown_module[64], shown_name[64];
    show(shown_module, sizeof shown_module, module, module_length);
    show(shown_name, sizeof shown_name, name, length);
    return fail(ERR_INPUT,
                "refused: it wants Python's %s.%s; only tensors and plain values are read",
                shown_module, shown_name);
}

static int op_global(struct pickle *p)
{
    const char *module, *name;
    size_t module_length, length;
    TRY(read_line(p, &module, &module_length));
    TRY(read_line(p, &name, &length));
    return push_global(p, module, module_length, name, length);
}

static int op_stack_global(struct pickle *p)
{
    value *module, *name;
    TRY(pop(p, &name));
    TRY(pop(p, &module));
    if (name->kind != PICKLE_TEXT || module->kind != PICKLE_TEXT)
        return bad(p, "names a global by something that is no text");
    return push_global(p, module->text, module->count, name->text, name->count);
}

// ('storage', type, key, device, elements), as the only kind of persistent id.
static int op_persistent(struct pickle *p)
{
    value *id;
    TRY(pop(p, &id));
    value *const *f = id->kind == PICKLE_TUPLE && id->count >= 5 ? id->items : NULL;
    if (!f || f[0]->kind != PICKLE_TEXT || !is_text(f[0]->text, f[0]->count, "storage") ||
        f[1]->kind != PICKLE_GLOBAL || globals[f[1]->global].meaning != G_STORAGE ||
        f[2]->kind != PICKLE_TEXT || f[4]->kind != PICKLE_INT || f[4]->i < 0)
        return bad(p, "has a persistent id that is no tensor storage");
    if (id->count > 5 && f[5]->kind != PICKLE_NONE)
        return bad(p, "has a storage that is a view of another, which is not supported");
    const int dtype = globals[f[1]->global].dtype;
    void *at;
    TRY(take(p, sizeof(struct pickle_storage), &at));
    struct pickle_storage *storage = at;
    *storage = (struct pickle_storage){.dtype = dtype < 0 ? ST_U8 : (enum st_dtype)dtype,
                                       .other = dtype < 0 ? globals[f[1]->global].name : NULL,
                                       .count = f[4]->i,
                                       .element = globals[f[1]->global].element,
                                       .key = f[2]};
    TRY(push_value(p, (value){.kind = PICKLE_STORAGE, .storage = storage}));
    TRY(grow(p, &p->storages, p->storage_count, &p->storage_room));
    p->storages[p->storage_count++] = p->stack[p->depth - 1];
    return 0;
}

static int push_tensor(struct pickle *p, const value *args)
{
    value *const *f = args->items;
    if (args->count < 4 || f[0]->kind != PICKLE_STORAGE || f[1]->kind != PICKLE_INT ||
        f[2]->kind != PICKLE_TUPLE || f[3]->kind != PICKLE_TUPLE)
        return bad(p, "has a tensor that is not storage, offset, sizes and strides");
    return push_value(p, (value){.kind = PICKLE_TENSOR, .items = args->items, .count = 4});
}

static bool makes_tensor(const value *v)
{
    return v->kind == PICKLE_GLOBAL && globals[v->global].meaning == G_TENSOR;
}

// A Parameter with attributes of its own: the tensor in it.
static int push_typed(struct pickle *p, const value *args)
{
    if (args->count < 3 || !makes_tensor(args->items[0]) || args->items[2]->kind != PICKLE_TUPLE)
        return bad(p, "has an object with a type that is no tensor");
    return push_tensor(p, args->items[2]);
}

static int push_first(struct pickle *p, const value *args, const char *what)
{
    return args->count ? push(p, args->items[0]) : bad(p, what);
}

static int op_reduce(struct pickle *p)
{
    value *args, *callee;
    TRY(pop(p, &args));
    TRY(pop(p, &callee));
    if (callee->kind != PICKLE_GLOBAL || args->kind != PICKLE_TUPLE)
        return bad(p, "calls something that is no function");
    switch (globals[callee->global].meaning) {
    case G_TENSOR:
        return push_tensor(p, args);
    case G_PARAMETER:
        return push_first(p, args, "has a parameter without a tensor");
    case G_TYPED:
        return push_typed(p, args);
    case G_ORDERED:
        return push_value(p, (value){.kind = PICKLE_DICT});
    case G_FIRST:
        return push_first(p, args, "has a size or a number without a value");
    case G_OTHER:
        return push(p, &other);
    case G_STORAGE:
        break;
    }
    return bad(p, "calls something that is no function");
}

// State is what else an object holds: an OrderedDict's _metadata, a Namespace's fields.
static int op_build(struct pickle *p)
{
    value *state, *object;
    TRY(pop(p, &state));
    TRY(pop(p, &object));
    if (object->kind != PICKLE_DICT && object->kind != PICKLE_OTHER)
        return bad(p, "gives state to something that has none");
    return push(p, object);
}

// ---- containers ---------------------------------------------------------------------------------

static int make_tuple(struct pickle *p, size_t count)
{
    if (count > p->depth)
        return bad(p, "takes from an empty stack");
    for (size_t i = 0; i < count; i++)
        if (!p->stack[p->depth - 1 - i])
            return bad(p, "takes from an empty stack");
    if (!count)
        return push(p, &nothing);
    value v = {.kind = PICKLE_TUPLE};
    TRY(append(p, &v, p->stack + p->depth - count, count));
    p->depth -= count;
    return push_value(p, v);
}

static int op_tuple(struct pickle *p)
{
    size_t mark, count;
    TRY(find_mark(p, &mark, &count));
    TRY(make_tuple(p, count));
    p->stack[mark] = p->stack[p->depth - 1];
    p->depth = mark + 1;
    return 0;
}

// APPENDS and SETITEMS: everything above the mark goes into the container below it.
static int fill_marked(struct pickle *p, enum pickle_kind kind)
{
    size_t mark, count;
    value *to;
    TRY(find_mark(p, &mark, &count));
    p->depth = mark;
    TRY(top(p, kind, &to));
    if (kind == PICKLE_DICT && count % 2)
        return bad(p, "has a key without a value");
    return append(p, to, p->stack + mark + 1, count);
}

static int fill(struct pickle *p, enum pickle_kind kind, size_t count)
{
    value *to, *items[2] = {0};
    for (size_t i = count; i-- > 0;)
        TRY(pop(p, &items[i]));
    TRY(top(p, kind, &to));
    return append(p, to, items, count);
}

// ---- memo ---------------------------------------------------------------------------------------

// An index beyond the pickle's own length cannot have been reached by counting.
static int memo_put(struct pickle *p, uint64_t index)
{
    if (!p->depth || !p->stack[p->depth - 1])
        return bad(p, "takes from an empty stack");
    if (index > p->size)
        return bad(p, "has a memo index larger than itself");
    while (p->memo_count <= index) {
        TRY(grow(p, &p->memo, p->memo_count, &p->memo_room));
        p->memo[p->memo_count++] = NULL;
    }
    p->memo[index] = p->stack[p->depth - 1];
    return 0;
}

static int op_put(struct pickle *p, int bytes)
{
    uint64_t index;
    TRY(read_uint(p, bytes, &index));
    return memo_put(p, index);
}

static int op_get(struct pickle *p, int bytes)
{
    uint64_t index;
    TRY(read_uint(p, bytes, &index));
    if (index >= p->memo_count || !p->memo[index])
        return bad(p, "gets what was never put");
    return push(p, p->memo[index]);
}

// ---- the loop -----------------------------------------------------------------------------------

static int op_proto(struct pickle *p)
{
    uint64_t version;
    TRY(read_uint(p, 1, &version));
    return version >= 2 && version <= 5 ? 0 : bad(p, "is of an unknown protocol");
}

static int op_pop(struct pickle *p)
{
    value *dropped;
    return pop(p, &dropped);
}

static int op_frame(struct pickle *p)
{
    uint64_t length;
    TRY(read_uint(p, 8, &length));
    return need(p, length);
}

static int step_value(struct pickle *p, uint8_t op)
{
    switch (op) {
    case 'N':
        return push(p, &none);
    case 0x88:
    case 0x89:
        return push(p, &truth[op == 0x88]);
    case 'J':
        return read_int(p, 4);
    case 'K':
        return read_int(p, 1);
    case 'M':
        return read_int(p, 2);
    case 0x8a:
        return read_long(p);
    case 'G':
        return read_float(p);
    case 'X':
    case 'T':
    case 'B':
        return read_text(p, 4);
    case 0x8c:
    case 'U':
    case 'C':
        return read_text(p, 1);
    }
    return fail(ERR_INPUT, "refused: pickle byte %zu: opcode 0x%02x is not one that tensors need",
                p->at - 1, op);
}

static int step_container(struct pickle *p, uint8_t op)
{
    switch (op) {
    case '}':
        return push_value(p, (value){.kind = PICKLE_DICT});
    case ']':
        return push_value(p, (value){.kind = PICKLE_LIST});
    case ')':
        return push(p, &nothing);
    case '(':
        return push(p, NULL);
    case 't':
        return op_tuple(p);
    case 0x85:
    case 0x86:
    case 0x87:
        return make_tuple(p, (size_t)op - 0x84);
    case 'a':
        return fill(p, PICKLE_LIST, 1);
    case 'e':
        return fill_marked(p, PICKLE_LIST);
    case 's':
        return fill(p, PICKLE_DICT, 2);
    case 'u':
        return fill_marked(p, PICKLE_DICT);
    }
    return step_value(p, op);
}

static int step(struct pickle *p, uint8_t op)
{
    switch (op) {
    case 0x80:
        return op_proto(p);
    case 0x95:
        return op_frame(p);
    case 'c':
        return op_global(p);
    case 0x93:
        return op_stack_global(p);
    case 'Q':
        return op_persistent(p);
    case 'R':
    case 0x81: // NEWOBJ: a class instead of a function, the same thing here
        return op_reduce(p);
    case 'b':
        return op_build(p);
    case '0':
        return op_pop(p);
    case 'q':
        return op_put(p, 1);
    case 'r':
        return op_put(p, 4);
    case 0x94:
        return memo_put(p, p->memo_count);
    case 'h':
        return op_get(p, 1);
    case 'j':
        return op_get(p, 4);
    }
    return step_container(p, op);
}

static int run(struct pickle *p)
{
    for (;;) {
        TRY(need(p, 1));
        const uint8_t op = p->data[p->at++];
        if (op == '.')
            break;
        TRY(step(p, op));
    }
    TRY(pop(p, &p->root));
    return p->depth ? bad(p, "leaves values on its stack") : 0;
}

int pickle_read(const uint8_t *data, size_t size, struct pickle **out, size_t *used)
{
    *out = NULL;
    struct pickle *p = calloc(1, sizeof *p);
    if (!p)
        return fail(ERR_NOMEM, "out of memory for a pickle");
    p->data = data;
    p->size = size;
    int code = run(p);
    if (code < 0) {
        pickle_free(p);
        return code;
    }
    *used = p->at;
    *out = p;
    return 0;
}

void pickle_free(struct pickle *p)
{
    if (!p)
        return;
    while (p->chunks) {
        struct chunk *next = p->chunks->next;
        free(p->chunks);
        p->chunks = next;
    }
    free(p->stack);
    free(p->memo);
    free(p->storages);
    free(p);
}

const struct pickle_value *pickle_root(const struct pickle *p)
{
    return p->root;
}

const struct pickle_value *const *pickle_storages(const struct pickle *p, size_t *count)
{
    *count = p->storage_count;
    return (const struct pickle_value *const *)p->storages;
}

const struct pickle_value *pickle_entry(const struct pickle_value *dict, size_t i,
                                        const struct pickle_value **key)
{
    *key = dict->items[2 * i];
    return (*key)->kind == PICKLE_TEXT ? dict->items[2 * i + 1] : NULL;
}

const struct pickle_value *pickle_get(const struct pickle_value *dict, const char *key)
{
    const struct pickle_value *k;
    if (!dict || dict->kind != PICKLE_DICT)
        return NULL;
    for (size_t i = dict->count / 2; i-- > 0;) {
        const struct pickle_value *v = pickle_entry(dict, i, &k);
        if (v && is_text(k->text, k->count, key))
            return v;
    }
    return NULL;
}
