# Fail if an object compiled for one instruction set exports a symbol outside that set's namespace. The linker keeps one
# copy of an inline function: a copy with AVX-512 would crash processors without it.
foreach(object IN LISTS OBJECTS)
  string(REGEX MATCH "kernels_([a-z0-9_]+)\\.dir" _ "${object}")
  set(isa "${CMAKE_MATCH_1}")
  execute_process(COMMAND "${NM}" --defined-only --demangle "${object}" OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[0-9a-f]+ [TWVu] [^\n]+" exported "${symbols}")
  foreach(symbol IN LISTS exported)
    if(NOT symbol MATCHES "megalodon::${isa}::|__gxx_personality|__clang_call_terminate")
      message(FATAL_ERROR "${object} exports `${symbol}`; move it into the namespace MEGALODON_ISA or inline it always.")
    endif()
  endforeach()
endforeach()
