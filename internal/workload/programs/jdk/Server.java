import com.sun.net.httpserver.HttpServer;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.util.logging.Logger;
import java.util.stream.IntStream;

/**
 * Serves one request to itself and says ready. With the argument "hold" it then waits to be
 * stopped; else it ends.
 */
public final class Server {
  private Server() {}

  public static void main(String[] args) throws Exception {
    HttpServer server =
        HttpServer.create(new InetSocketAddress(InetAddress.getLoopbackAddress(), 0), 0);
    server.createContext(
        "/",
        exchange -> {
          Logger.getLogger("server").fine(() -> "request from " + exchange.getRemoteAddress());
          byte[] answer = String.valueOf(IntStream.range(0, 1000).sum()).getBytes();
          exchange.sendResponseHeaders(200, answer.length);
          exchange.getResponseBody().write(answer);
          exchange.close();
        });
    server.start();
    URI self = URI.create("http://127.0.0.1:" + server.getAddress().getPort() + "/");
    HttpResponse<String> answer =
        HttpClient.newHttpClient()
            .send(HttpRequest.newBuilder(self).build(), HttpResponse.BodyHandlers.ofString());
    System.out.println("ready " + answer.body());
    if (args.length > 0 && args[0].equals("hold")) {
      Thread.currentThread().join();
    }
    server.stop(0);
    System.exit(0);
  }
}
