// See json_members.h.
#include "model/json_members.h"

static bool is_space(char c)
{
    return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}

static void skip_space(struct json_members *m)
{
    while (m->at < m->end && is_space(*m->at))
        m->at++;
}

static bool give_up(struct json_members *m, const char *what)
{
    m->wrong = what;
    return false;
}

static bool take(struct json_members *m, char c)
{
    skip_space(m);
    if (m->at == m->end || *m->at != c)
        return false;
    m->at++;
    return true;
}

// From the quote on to after the one that ends it.
static bool skip_string(struct json_members *m)
{
    for (m->at++; m->at < m->end && *m->at != '"'; m->at++)
        if (*m->at == '\\' && ++m->at == m->end)
            break;
    if (m->at == m->end)
        return give_up(m, "a string does not end");
    m->at++;
    return true;
}

// Whatever it is, to the comma or bracket that follows it.
static bool skip_value(struct json_members *m)
{
    size_t depth = 0;
    for (; m->at < m->end; m->at++) {
        const char c = *m->at;
        if (c == '"') {
            if (!skip_string(m))
                return false;
            m->at--;
        } else if (c == '{' || c == '[') {
            depth++;
        } else if (depth == 0 && (c == ',' || c == '}' || c == ']')) {
            return true;
        } else if (c == '}' || c == ']') {
            depth--;
        }
    }
    return give_up(m, "a value does not end");
}

struct json_members json_members(struct json_span object)
{
    return (struct json_members){object.text, object.text, object.text + object.length, NULL,
                                 false};
}

// After the last member there is nothing but white space.
static bool finish(struct json_members *m)
{
    skip_space(m);
    return m->at == m->end ? false : give_up(m, "something follows the object");
}

bool json_members_next(struct json_members *m, struct json_span *key, struct json_span *value)
{
    if (m->wrong)
        return false;
    if (!m->started) {
        m->started = true;
        if (!take(m, '{'))
            return give_up(m, "no object begins");
        if (take(m, '}'))
            return finish(m);
    } else if (take(m, '}')) {
        return finish(m);
    } else if (!take(m, ',')) {
        return give_up(m, "neither a comma nor the object's end");
    }
    skip_space(m);
    if (m->at == m->end || *m->at != '"')
        return give_up(m, "a name must come here");
    key->text = m->at;
    if (!skip_string(m))
        return false;
    key->length = (size_t)(m->at - key->text);
    if (!take(m, ':'))
        return give_up(m, "no colon after a name");
    skip_space(m);
    value->text = m->at;
    if (!skip_value(m))
        return false;
    value->length = (size_t)(m->at - value->text);
    while (value->length && is_space(value->text[value->length - 1]))
        value->length--;
    return true;
}
