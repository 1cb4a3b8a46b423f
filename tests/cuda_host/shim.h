// What the kernels take from CUDA and CuPy's headers, for a C++ compiler.
#include <cmath>
#include <complex>
#include <cstddef>
#define __device__
#define CUDART_INF HUGE_VAL
#define CUDART_NAN NAN
typedef _Float16 float16;
template <typename T> using complex = std::complex<T>;
template <typename T> T atomicAdd(T* place, T more) {
    const T before = *place;
    *place += more;
    return before;
}
using std::abs;
using std::exp;
using std::ldexp;
using std::log;
using std::sqrt;
using std::tanh;
