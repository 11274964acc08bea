// kernels.cl as CUDA: what nvcc compiles, after including devices/cl_cuda.h and kernels.cl, into
// the fat binaries of the CUDA backend (devices/cuda.h). Its own lines only check that the kernels
// have the arguments that kernels.def says.
#undef inline
#undef restrict
#undef KERNEL

template <class T> struct letter;
template <class T> struct letter<T *> {
    static constexpr char value = 'b';
};
template <> struct letter<int> {
    static constexpr char value = 'i';
};
template <> struct letter<unsigned> {
    static constexpr char value = 'u';
};
template <> struct letter<float> {
    static constexpr char value = 'f';
};

template <class F> struct signature;
template <class... A> struct signature<void(A...)> {
    static constexpr bool is(const char *args)
    {
        const char own[] = {letter<A>::value..., 0};
        for (unsigned i = 0; i < sizeof own; i++)
            if (own[i] != args[i])
                return false;
        return true;
    }
};

#define CHECK_FORM_ANY(name, args)                                                                 \
    static_assert(signature<decltype(name)>::is(args), #name ": arguments are not " args);
#define CHECK_FORM_GPU(name, args) CHECK_FORM_ANY(name, args)
#define CHECK_FORM_CPU(name, args) // OpenCL only
#define KERNEL(name, x, y, args, form) CHECK_##form(name, args)
#include "devices/kernels.def"
