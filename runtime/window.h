// Windows: host memory between a rank's device and the other ranks. The device copies into it on a
// stream of its own, so that the work that was put on the device's stream meanwhile is not waited
// for; its pages are locked where the backend can; and ranks of one machine see each other's, so
// that what one rank's device has written, another's reads with no copy between. Where a rank
// cannot be seen (another machine, another container, DITMOE_SHARE=0), the memory is what MPI sends
// from and receives in.
#ifndef DITMOE_WINDOW_H
#define DITMOE_WINDOW_H

#include "devices/device.h"
#include "runtime/exchange.h"

struct window;

// A collective call, also in `bytes`, which may differ. Without an exchange (ranks on paper,
// model/cost.h) there is no window: NULL, of which window_all() is false. `stream` is the one that
// the device computes on.
int window_open(struct exchange *x, struct device *dev, struct stream *stream, size_t bytes,
                struct window **out);
void window_close(struct window *w);

// Where a rank's memory lies here; NULL: it cannot be seen. One's own always can.
unsigned char *window_of(const struct window *w, int rank);
bool window_all(const struct window *w); // are all seen by all?

// Copies to this rank's memory begin after what the device's stream holds at window_after(), beside
// what it is given later. window_done() waits for them, and so for all that the stream held then.
int window_after(struct window *w);
// Bytes from `offset` of src to `at` of this rank's memory.
int window_take(struct window *w, const struct mem *src, size_t offset, size_t at, size_t bytes);
int window_done(struct window *w);

// From a rank's memory to the device, on its stream; begun. The memory must stay as it is until it
// is done.
int window_give(struct window *w, int rank, size_t at, struct mem *dst, size_t offset,
                size_t bytes);

// Ranks that keep out of meetings from now on, [ranks], NULL: none; if this one is among them it
// meets nobody.
void window_apart(struct window *w, const bool *apart);

// Tells all ranks that see this one's memory that it is ready, and expects the same of them; done
// when the set is.
int window_meet(struct window *w, struct transfers *t);

#endif
