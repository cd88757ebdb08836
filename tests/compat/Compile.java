// Compiles and runs the programs in the folders that are its arguments, all in one virtual machine: that is ten times
// quicker than one for each. Writes into each folder what came of it: errors, output, and how the program ended.
import java.io.*;
import java.net.*;
import java.nio.charset.StandardCharsets;
import java.nio.file.*;
import java.util.*;
import javax.tools.*;

class Compile {
    public static void main(String[] folders) throws Exception {
        PrintStream out = System.out;
        for (String folder : folders) {
            Path place = Path.of(folder);
            Files.writeString(place.resolve("errors"), String.join("\n", compile(place)));
            ByteArrayOutputStream printed = new ByteArrayOutputStream();
            String end = "not compiled";
            if (Files.size(place.resolve("errors")) == 0) {
                System.setOut(new PrintStream(printed, true, StandardCharsets.UTF_8));
                end = run(place, Files.readString(place.resolve("main")).strip());
                System.setOut(out);
            }
            Files.write(place.resolve("output"), printed.toByteArray());
            Files.writeString(place.resolve("end"), end);
        }
    }

    static List<String> compile(Path place) throws IOException {
        JavaCompiler compiler = ToolProvider.getSystemJavaCompiler();
        DiagnosticCollector<JavaFileObject> said = new DiagnosticCollector<>();
        try (StandardJavaFileManager files = compiler.getStandardFileManager(said, null, StandardCharsets.UTF_8)) {
            Path source = Path.of(Files.readString(place.resolve("source")).strip());
            compiler.getTask(null, files, said, List.of("-proc:none", "-d", place.toString()), null,
                files.getJavaFileObjects(place.resolve(source))).call();
        }
        List<String> errors = new ArrayList<>();
        for (Diagnostic<?> one : said.getDiagnostics())
            if (one.getKind() == Diagnostic.Kind.ERROR) errors.add(one.getMessage(null).replace("\n", " "));
        return errors;
    }

    static String run(Path place, String name) throws Exception {
        try (URLClassLoader loader = new URLClassLoader(new URL[] {place.toUri().toURL()})) {
            var main = loader.loadClass(name).getDeclaredMethod("main", String[].class);
            main.setAccessible(true);
            main.invoke(null, (Object) new String[0]);
            return "";
        } catch (java.lang.reflect.InvocationTargetException problem) {
            return problem.getCause().toString();
        } catch (ReflectiveOperationException problem) {
            return problem.toString();
        }
    }
}
